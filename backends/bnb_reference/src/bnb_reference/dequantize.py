"""Kernels that dequantize blocks, and the pieces of 4-bit tensors that products are made of."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import kernel
from bnb_reference.blocks import piece_size, pieces


@kernel("dequantize_blockwise")
def dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: torch.Tensor
) -> None:
    """Fill `out` with codebook[code] * absmax."""
    codes, out, codebook = codes.view(-1), out.view(-1), codebook.view(-1)
    for elements, blocks in pieces(codes.numel(), blocksize, piece_size(codes.device)):
        scale = absmax[blocks, None]
        values = codebook.index_select(0, codes[elements].int()).view(scale.numel(), -1)
        out[elements] = values.mul_(scale).view(-1)


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
    step = piece_size(packed.device)
    for start in range(0, out.numel(), step):
        stop = min(start + step, out.numel())
        out[start:stop] = values[start:stop]


class Values4bit:
    """The float32 values of a 4-bit tensor of n elements; `values[start:stop]` dequantizes those elements of it."""

    def __init__(
        self, packed: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, nested: Optional[Nested]
    ) -> None:
        self.device = packed.device
        self._packed = packed.view(-1)
        self._absmax = absmax.view(-1)
        codebook = codebook.view(-1)
        # The two values of each byte, so that one look-up serves two elements.
        self._pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), 1)
        self._blocksize = blocksize
        self._nested = nested

    def __getitem__(self, elements: slice) -> torch.Tensor:
        blocksize = self._blocksize
        first, last = elements.start // blocksize, -(-elements.stop // blocksize)
        offset = first * blocksize
        codes = self._packed[offset // 2 : last * blocksize // 2].int()
        # Whole blocks: where the tensor ends within one, what follows its end is scaled too, and not returned.
        values = torch.empty((last - first) * blocksize, dtype=torch.float32, device=codes.device)
        values[: 2 * codes.numel()] = self._pairs.index_select(0, codes).view(-1)
        blocks = torch.arange(first, last, device=self.device)
        values.view(-1, blocksize).mul_(block_scales(self._absmax, self._nested, blocks)[:, None])
        return values[elements.start - offset : elements.stop - offset]


def block_scales(absmax: torch.Tensor, nested: Optional[Nested], blocks: torch.Tensor) -> torch.Tensor:
    """Return the float32 scales of these blocks, recovering them where they are quantized themselves."""
    scales = absmax.index_select(0, blocks)
    if nested is None:
        return scales
    scales = nested.codebook.view(-1).index_select(0, scales.int())
    groups = torch.div(blocks, nested.blocksize, rounding_mode="floor")
    # Two operations, and a rounding after each.
    return scales.mul_(nested.absmax.view(-1).index_select(0, groups)).add_(nested.offset)
