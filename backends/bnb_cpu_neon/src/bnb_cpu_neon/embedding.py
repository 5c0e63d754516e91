"""Embedding ops: each hands its tensors to the native kernel of the same name."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.ops import Nested
from bnb_cpu_neon import engine
from bnb_cpu_neon.engine import DTYPES, kernel


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
    wanted = (indices, indices.dtype == torch.int64, indices.numel())
    table = (packed, absmax, codebook, blocksize, nested, embedding_dim)
    engine.native.embedding_4bit(*wanted, *table, DTYPES[out.dtype], out, torch.get_num_threads())


@kernel("embedding_8bit")
def embedding_8bit(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with rows of the table."""
    wanted = (indices, indices.dtype == torch.int64, indices.numel())
    engine.native.embedding_8bit(*wanted, codes, absmax, codes.shape[1], DTYPES[out.dtype], out, torch.get_num_threads())
