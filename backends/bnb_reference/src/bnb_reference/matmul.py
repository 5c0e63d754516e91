"""Kernels that multiply by 4-bit weights: panels of the weight are dequantized to float32, and multiplied in float32.

A panel takes at most 16 MB, or one row of the weight where that is larger. Many rows of bfloat16 are multiplied by the processor's
bfloat16 instructions, five times as fast, where it has them and the values allow it: they take subnormal numbers for zero.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import devices, kernel
from bnb_reference.blocks import row_pieces
from bnb_reference.dequantize import Values4bit, block_scales

#: From how many rows on rounding the weight to bfloat16 is worth its loss of digits.
BFLOAT16_ROWS = 32
#: Magnitudes of which neither a product nor a sum of products leaves the range of normal numbers.
SMALLEST, LARGEST = 2.0**-60, 2.0**60


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
    weight = Values4bit(packed, absmax, codebook, blocksize, nested)
    x, out = _operand(x.view(-1, K), weight), out.view(-1, N)
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
    weight = Values4bit(packed, absmax, codebook, blocksize, nested)
    g = _operand(g.view(-1, N), weight)
    total = torch.zeros(len(g), K, dtype=torch.float32, device=g.device)
    for rows in row_pieces(N, K, g.device):
        total += matmul(g[:, rows], weight[rows.start * K : rows.stop * K].view(-1, K))
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
    """Multiply in the dtype of `a`, even under autocast, which leaves calls with `out` alone; return float32."""
    return torch.mm(a, b.to(a.dtype), out=torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)).float()


def _operand(x: torch.Tensor, weight: Values4bit) -> torch.Tensor:
    """Return x in the dtype to multiply in: float32, or bfloat16 where that is faster and within the error bound of products."""
    if (
        x.dtype == torch.bfloat16
        and len(x) >= BFLOAT16_ROWS
        and devices.multiplies_bfloat16(x.device)
        and _moderate(x)
        and _moderate(weight.scales())
        and _moderate(weight.codebook)
    ):
        return x
    return x.float()


def _moderate(values: torch.Tensor) -> bool:
    """Say whether all values are zero or neither tiny, huge, nor NaN."""
    magnitudes = values.abs()
    return bool(((magnitudes == 0) | ((magnitudes >= SMALLEST) & (magnitudes <= LARGEST))).all())


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
