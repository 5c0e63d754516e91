"""Kernels that dequantize only the rows of a table that are asked for."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import kernel
from bnb_reference.blocks import row_pieces
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
    """Fill `out` with rows of the table."""
    packed, absmax, codebook = packed.view(-1), absmax.view(-1), codebook.view(-1)
    indices, out = indices.view(-1, 1), out.view(-1, embedding_dim)
    column = torch.arange(embedding_dim, device=packed.device)
    for rows in row_pieces(len(indices), embedding_dim, packed.device):
        # Rows may start within a byte or a block, so each element looks up its own.
        element = (indices[rows].long() * embedding_dim + column).view(-1)
        pair = packed.index_select(0, element >> 1)
        code = torch.where((element & 1).bool(), pair & 15, pair >> 4)
        block = torch.div(element, blocksize, rounding_mode="floor")
        values = codebook.index_select(0, code.int()).mul_(block_scales(absmax, nested, block))
        out[rows] = values.view(-1, embedding_dim)


@kernel("embedding_8bit")
def embedding_8bit(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with rows of the table."""
    indices, out = indices.view(-1), out.view(-1, codes.shape[1])
    scales = row_scales(absmax)
    for rows in row_pieces(len(indices), codes.shape[1], codes.device):
        out[rows] = codes.index_select(0, indices[rows]) * scales.index_select(0, indices[rows])
