"""Kernels that quantize blocks."""

from __future__ import annotations

from typing import Iterator, Tuple

import torch

from bnb_core.ops.spec import ABSMAX_FLOOR
from bnb_reference import kernel
from bnb_reference.blocks import piece_size, pieces


@kernel("quantize_blockwise")
def quantize_blockwise(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the code of each element and the absmax of each block."""
    codes, absmax = out[0].view(-1), out[1]
    midpoints, ranked = rank_entries(codebook)
    for elements, ranks in _rank(x, midpoints, blocksize, absmax):
        codes[elements] = ranked.index_select(0, ranks)


@kernel("quantize_4bit")
def quantize_4bit(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the packed codes and the absmax of each block."""
    packed, absmax = out
    midpoints, ranked = rank_entries(codebook)
    bytes_of_pairs = (ranked[:, None] << 4 | ranked).view(-1)
    zero = torch.bucketize(torch.zeros(1, device=x.device), midpoints, out_int32=True)
    for elements, ranks in _rank(x, midpoints, blocksize, absmax):
        if ranks.numel() % 2:
            ranks = torch.cat((ranks, zero))
        packed[elements.start // 2 : (elements.stop + 1) // 2] = bytes_of_pairs.index_select(0, ranks[::2] * 16 + ranks[1::2])


def rank_entries(codebook: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Sort a codebook's entries by value, then by code.

    Returns:
        The midpoints between neighbours, float32 [entries - 1], and the code of each rank, uint8 [entries].
    """
    values, codes = torch.sort(codebook.view(-1), stable=True)
    return (values[:-1] + values[1:]) * 0.5, codes.to(torch.uint8)


def _rank(x: torch.Tensor, midpoints: torch.Tensor, blocksize: int, absmax: torch.Tensor) -> Iterator[Tuple[slice, torch.Tensor]]:
    """Fill `absmax`, and yield pieces of x with the rank of the entry nearest to each element, int32."""
    x = x.view(-1)
    absmax.zero_()
    limit = piece_size(x.device)
    for elements, blocks in pieces(x.numel(), blocksize, limit):
        piece = x[elements].view(absmax[blocks].numel(), -1)
        absmax[blocks] = torch.maximum(absmax[blocks], piece.abs().amax(1).float())
    # Tensor over tensor is one IEEE division.
    scale = torch.ones_like(absmax).div_(absmax.clamp(min=ABSMAX_FLOOR))
    for elements, blocks in pieces(x.numel(), blocksize, limit):
        piece = x[elements].float().view(absmax[blocks].numel(), -1)
        scaled = torch.nan_to_num_(piece * scale[blocks, None], nan=0.0)
        yield elements, torch.bucketize(scaled.view(-1), midpoints, out_int32=True)
