"""Kernels that dequantize blocks, and the values of a 4-bit tensor for the kernels that multiply by it."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import kernel
from bnb_reference.blocks import pieces
from bnb_reference.devices import piece_size


@kernel("dequantize_blockwise")
def dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: torch.Tensor
) -> None:
    """Fill `out` with codebook[code] * absmax."""
    codes, absmax, codebook, out = codes.view(-1), absmax.view(-1), codebook.view(-1), out.view(-1)
    for elements, blocks in pieces(codes.numel(), blocksize, piece_size(codes.device)):
        scales = absmax[blocks, None]
        values = codebook.index_select(0, codes[elements].long())
        values.view(len(scales), -1).mul_(scales)
        out[elements] = values


@kernel("dequantize_4bit")
def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with codebook[code] * absmax."""
    out = out.view(-1)
    values = Values4bit(packed, absmax, codebook, blocksize, nested)
    for elements, _ in pieces(out.numel(), blocksize, piece_size(packed.device)):
        out[elements] = values[elements]


class Values4bit:
    """The float32 values of a 4-bit tensor of n elements; `values[start:stop]` dequantizes those elements of it."""

    def __init__(
        self, packed: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, nested: Optional[Nested]
    ) -> None:
        self.device = packed.device
        self.codebook = codebook
        self._packed = packed.view(-1)
        self._absmax = absmax.view(-1)
        self._blocksize = blocksize
        self._nested = nested
        self._pairs = pair_table(codebook)

    def __getitem__(self, elements: slice) -> torch.Tensor:
        blocksize = self._blocksize
        first, last = elements.start // blocksize, -(-elements.stop // blocksize)
        offset = first * blocksize
        codes = self._packed[offset // 2 : last * blocksize // 2]
        values = pair_values(self._pairs, codes)
        scales = block_scales(self._absmax, self._nested, torch.arange(first, last, device=self.device))
        whole = len(values) - len(values) % blocksize
        values[:whole].view(-1, blocksize).mul_(scales[: whole // blocksize, None])
        values[whole:].mul_(scales[-1:])  # the end of the last block, where that is shorter
        return values[elements.start - offset : elements.stop - offset]

    def scales(self) -> torch.Tensor:
        """Return the float32 scale of every block."""
        return block_scales(self._absmax, self._nested, torch.arange(self._absmax.numel(), device=self.device))


def pair_table(codebook: torch.Tensor) -> torch.Tensor:
    """Return the two float32 values of each byte as one 64-bit number, so that one look-up serves two elements."""
    codebook = codebook.view(-1)
    return torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), 1).view(torch.int64).view(-1)


def pair_values(table: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of packed codes, uint8 [bytes], before they are scaled."""
    return table.index_select(0, packed.int()).view(torch.float32)


def block_scales(absmax: torch.Tensor, nested: Optional[Nested], blocks: torch.Tensor) -> torch.Tensor:
    """Return the float32 scales of the numbered blocks, recovering them where they are quantized themselves.

    Args:
        absmax: float32, or uint8 with `nested`; one dimension.
        nested: what the scales are quantized with.
        blocks: int64, any number of blocks in any order; one dimension.
    """
    scales = absmax.index_select(0, blocks)
    if nested is None:
        return scales
    groups = torch.div(blocks, nested.blocksize, rounding_mode="floor")
    values = nested.codebook.view(-1).index_select(0, scales.int())
    # Two operations, and a rounding after each.
    return values.mul_(nested.absmax.view(-1).index_select(0, groups)).add_(nested.offset)
