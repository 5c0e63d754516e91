"""Kernels that quantize blocks."""

from __future__ import annotations

from typing import Iterator, Tuple

import torch

from bnb_core.ops.spec import ABSMAX_FLOOR
from bnb_reference import kernel
from bnb_reference.blocks import pieces
from bnb_reference.devices import piece_size


@kernel("quantize_blockwise")
def quantize_blockwise(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the code of each element and the absmax of each block."""
    codes, absmax = out[0].view(-1), out[1]
    midpoints, code_of_rank = rank_entries(codebook)
    for elements, scaled in _scale_blocks(x, blocksize, absmax):
        codes[elements] = code_of_rank.index_select(0, _search(scaled, midpoints).int())


@kernel("quantize_4bit")
def quantize_4bit(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the packed codes and the absmax of each block."""
    packed, absmax = out
    midpoints, code_of_rank = rank_entries(codebook)
    # The byte of each pair of ranks, so that one look-up serves two elements.
    byte_of_pair = (code_of_rank[:, None] << 4 | code_of_rank).view(-1)
    for elements, scaled in _scale_blocks(x, blocksize, absmax):
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        ranks = _count(scaled, midpoints).view(-1, 2)
        pairs = ranks[:, 0] * 16 + ranks[:, 1]
        packed[elements.start // 2 : (elements.stop + 1) // 2] = byte_of_pair.index_select(0, pairs.int())


def rank_entries(codebook: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Rank a codebook's entries by value, then by code.

    Returns:
        The midpoints between neighbours, float32 [entries - 1], and the code of each rank, uint8 [entries].
    """
    values, codes = torch.sort(codebook.view(-1), stable=True)
    return (values[:-1] + values[1:]) * 0.5, codes.to(torch.uint8)


def _scale_blocks(x: torch.Tensor, blocksize: int, absmax: torch.Tensor) -> Iterator[Tuple[slice, torch.Tensor]]:
    """Fill `absmax`, then yield x piece by piece, scaled to [-1, 1], in float32; 0 where that is NaN."""
    x = x.view(-1)
    absmax.zero_()
    for elements, blocks in pieces(x.numel(), blocksize, piece_size(x.device)):
        maxima = absmax[blocks]
        torch.maximum(maxima, x[elements].float().view(len(maxima), -1).abs().amax(1), out=maxima)
    # Tensor over tensor is one IEEE division; number over tensor is a reciprocal and a product, which round twice.
    scale = torch.ones_like(absmax).div_(absmax.clamp(min=ABSMAX_FLOOR))
    for elements, blocks in pieces(x.numel(), blocksize, piece_size(x.device)):
        scales = scale[blocks, None]
        scaled = x[elements].float().view(len(scales), -1) * scales
        yield elements, torch.nan_to_num_(scaled, nan=0.0).view(-1)


def _count(scaled: torch.Tensor, midpoints: torch.Tensor) -> torch.Tensor:
    """Return each element's rank, the number of midpoints below it, as float32."""
    ranks, below = torch.zeros_like(scaled), torch.empty_like(scaled)
    for midpoint in midpoints:
        ranks += torch.gt(scaled, midpoint, out=below)
    return ranks


def _search(scaled: torch.Tensor, midpoints: torch.Tensor) -> torch.Tensor:
    """Return the same by bisection, for more midpoints than one would count; 2^n - 1 of them.

    All elements take the same n steps together. On a CPU that is several times as fast as torch.bucketize, whose search for each
    element branches on random data.
    """
    ranks, below = torch.zeros_like(scaled), torch.empty_like(scaled)
    step = (len(midpoints) + 1) // 2
    while step:
        # `ranks` midpoints are below. If the one `step` further is below too, so are all between.
        further = midpoints.index_select(0, (ranks + (step - 1)).int())
        ranks.add_(torch.gt(scaled, further, out=below), alpha=step)
        step //= 2
    return ranks
