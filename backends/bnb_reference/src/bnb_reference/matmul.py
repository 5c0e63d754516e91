"""Kernels that multiply by 4-bit weights: panels of the weight are dequantized to float32, and multiplied in float32."""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import kernel
from bnb_reference.blocks import piece_size
from bnb_reference.dequantize import Values4bit, block_scales


@kernel("gemm_4bit")
def gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor],
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with x W^T + bias."""
    x, out = x.view(-1, K).float(), out.view(-1, N)
    for rows, panel in _panels(Values4bit(packed, absmax, codebook, blocksize, nested), N, K):
        product = matmul(x, panel.t())
        # Not the accumulator's first value: sums far smaller than the bias would lose digits.
        out[:, rows] = product if bias is None else product.add_(bias[rows])


@kernel("gemm_4bit_transposed")
def gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with g W."""
    g = g.view(-1, N).float()
    total = torch.zeros(g.shape[0], K, dtype=torch.float32, device=g.device)
    for rows, panel in _panels(Values4bit(packed, absmax, codebook, blocksize, nested), N, K):
        total += matmul(g[:, rows], panel)
    out.copy_(total.view(out.shape))


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply float32 matrices in float32, also where autocast is on: it leaves `out=` alone."""
    return torch.mm(a, b, out=torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device))


def _panels(values: Values4bit, N: int, K: int) -> Iterator[Tuple[slice, torch.Tensor]]:
    """Yield the weight [N, K] by groups of rows: which, and the float32 values."""
    step = max(1, piece_size(values.device) // K)
    for start in range(0, N, step):
        stop = min(start + step, N)
        yield slice(start, stop), values[start * K : stop * K].view(-1, K)


@kernel("grouped_gemm_4bit")
def grouped_gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with each token's product with its expert's weight."""
    for expert in range(packed.shape[0]):
        start, stop = int(offsets[expert]), int(offsets[expert + 1])
        if start < stop:
            weight = _expert(packed, absmax, codebook, blocksize, nested, expert)
            tokens = x[start:stop].float()
            for rows, panel in _panels(weight, N, K):
                out[start:stop, rows] = matmul(tokens, panel.t())


@kernel("grouped_gemm_4bit_transposed")
def grouped_gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with each token's gradient times its expert's weight."""
    for expert in range(packed.shape[0]):
        start, stop = int(offsets[expert]), int(offsets[expert + 1])
        if start < stop:
            weight = _expert(packed, absmax, codebook, blocksize, nested, expert)
            tokens = g[start:stop].float()
            total = torch.zeros(stop - start, K, dtype=torch.float32, device=g.device)
            for rows, panel in _panels(weight, N, K):
                total += matmul(tokens[:, rows], panel)
            out[start:stop] = total


def _expert(
    packed: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, nested: Optional[Nested], expert: int
) -> Values4bit:
    scales = absmax[expert]
    if nested is not None:
        blocks = absmax.shape[1]
        scales = block_scales(absmax.view(-1), nested, torch.arange(expert * blocks, (expert + 1) * blocks, device=absmax.device))
    return Values4bit(packed[expert], scales, codebook, blocksize, None)
