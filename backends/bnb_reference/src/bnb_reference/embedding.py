"""Kernels that dequantize only the rows of a table that are asked for."""

from __future__ import annotations

import math
from typing import Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_reference import kernel
from bnb_reference.blocks import row_pieces
from bnb_reference.dequantize import block_scales, pair_table, pair_values
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
    packed, absmax, indices, out = packed.view(-1), absmax.view(-1), indices.view(-1, 1), out.view(-1, embedding_dim)
    # A row is made of runs, which lie within one block each; and in whole bytes, but where rows have an odd number of elements.
    run = math.gcd(embedding_dim, blocksize)
    runs_in_row = torch.arange(embedding_dim // run, device=packed.device)
    pairs, codebook = pair_table(codebook), codebook.view(-1)
    for rows in row_pieces(len(indices), embedding_dim, packed.device):
        runs = (indices[rows].long() * len(runs_in_row) + runs_in_row).view(-1)
        if run > 1:
            values = pair_values(pairs, packed.view(-1, run // 2).index_select(0, runs).view(-1))
        else:
            pair = packed.index_select(0, runs >> 1)
            values = codebook.index_select(0, torch.where((runs & 1).bool(), pair & 15, pair >> 4).int())
        blocks = torch.div(runs * run, blocksize, rounding_mode="floor")
        values.view(-1, run).mul_(block_scales(absmax, nested, blocks)[:, None])
        out[rows] = values.view(-1, embedding_dim)


@kernel("embedding_8bit")
def embedding_8bit(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with rows of the table."""
    indices, out = indices.view(-1), out.view(-1, codes.shape[1])
    scales = row_scales(absmax)
    for rows in row_pieces(len(indices), codes.shape[1], codes.device):
        out[rows] = codes.index_select(0, indices[rows]) * scales.index_select(0, indices[rows])
