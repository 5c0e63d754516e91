"""Kernels that dequantize only the rows of a table that are asked for."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import kernel
from bnb_reference.blocks import piece_size
from bnb_reference.dequantize import block_scales
from bnb_reference.int8 import row_scales


@kernel("embedding_4bit")
def embedding_4bit(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    num_embeddings: int,
    embedding_dim: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with the rows of the table."""
    indices, packed, absmax, codebook = indices.view(-1), packed.view(-1), absmax.view(-1), codebook.view(-1)
    out = out.view(-1, embedding_dim)
    column = torch.arange(embedding_dim, device=packed.device)
    step = max(1, piece_size(packed.device) // embedding_dim)
    for start in range(0, len(indices), step):
        element = (indices[start : start + step, None].long() * embedding_dim + column).view(-1)
        pair = packed.index_select(0, element >> 1)
        code = torch.where(element & 1 == 0, pair >> 4, pair & 15)
        values = codebook.index_select(0, code.int()) * block_scales(
            absmax, nested, torch.div(element, blocksize, rounding_mode="floor")
        )
        out[start : start + step] = values.view(-1, embedding_dim)


@kernel("embedding_8bit")
def embedding_8bit(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with the rows of the table."""
    indices, out = indices.view(-1), out.view(-1, codes.shape[1])
    step = max(1, piece_size(codes.device) // codes.shape[1])
    for start in range(0, len(indices), step):
        rows = indices[start : start + step]
        scale = row_scales(absmax.view(-1).index_select(0, rows))
        out[start : start + step] = codes.index_select(0, rows).float().mul_(scale)
