"""Kernels that multiply by 4-bit weights: panels of the weight are dequantized to float32, and multiplied in float32.

A panel takes at most 16 MB, or one row of the weight where that is larger.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import devices, kernel
from bnb_reference.blocks import row_pieces
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
    weight = Values4bit(packed, absmax, codebook, blocksize, nested)
    for rows in row_pieces(N, K, x.device):
        product = matmul(x, weight[rows.start * K : rows.stop * K].view(-1, K).t())
        # The bias comes last: a sum that started with a large one would lose digits at every step.
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
    weight = Values4bit(packed, absmax, codebook, blocksize, nested)
    total = torch.zeros(len(g), K, dtype=torch.float32, device=g.device)
    for rows in row_pieces(N, K, g.device):
        total.addmm_(g[:, rows], weight[rows.start * K : rows.stop * K].view(-1, K))
    out.copy_(total.view(out.shape))


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

    def multiply(tokens: torch.Tensor, expert: int, product: torch.Tensor) -> None:
        scales = _expert_scales(absmax, nested, expert)
        gemm_4bit(tokens, packed[expert], scales, codebook, blocksize, N, K, None, None, out=product)

    _for_each_expert(multiply, x, offsets, out)


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
    """Fill `out` with the product of each token's gradient and its expert's weight."""

    def multiply(tokens: torch.Tensor, expert: int, product: torch.Tensor) -> None:
        scales = _expert_scales(absmax, nested, expert)
        gemm_4bit_transposed(tokens, packed[expert], scales, codebook, blocksize, N, K, None, out=product)

    _for_each_expert(multiply, g, offsets, out)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply float32 matrices in float32, even under autocast, which leaves calls with `out` alone."""
    return torch.mm(a, b, out=torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device))


def _expert_scales(absmax: torch.Tensor, nested: Optional[Nested], expert: int) -> torch.Tensor:
    """Return the float32 scales of one expert; nested scales run over all experts, and an expert may start within a group."""
    blocks = absmax.shape[1]
    numbers = torch.arange(expert * blocks, (expert + 1) * blocks, device=absmax.device)
    return block_scales(absmax.view(-1), nested, numbers)


def _for_each_expert(
    multiply: Callable[[torch.Tensor, int, torch.Tensor], Any], tokens: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor
) -> None:
    """Call `multiply` with an expert's tokens, its number, and where the product goes, for each expert."""
    if devices.reads_are_free(tokens.device):
        bounds = offsets.tolist()
        for expert, (start, stop) in enumerate(zip(bounds, bounds[1:])):
            if start < stop:
                multiply(tokens[start:stop], expert, out[start:stop])
        return
    # Whose a token is is known only on the device, and asking would wait for it: multiply all tokens, and keep the expert's.
    number = torch.arange(len(tokens), device=tokens.device)[:, None]
    product = torch.empty_like(out)
    for expert in range(len(offsets) - 1):
        multiply(tokens, expert, product)
        mine = (number >= offsets[expert]) & (number < offsets[expert + 1])
        out.copy_(torch.where(mine, product, out))
