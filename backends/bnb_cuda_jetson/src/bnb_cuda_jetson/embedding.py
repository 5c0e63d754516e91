"""Kernels of quantized tables, of which only the rows that are asked for are dequantized."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import DTYPES, current_stream, kernel, nested_addresses


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
    device = packed.get_device()
    _native.embedding_4bit(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[out.dtype],
        indices.data_ptr(),
        indices.element_size(),
        indices.numel(),
        packed.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        blocksize,
        num_embeddings,
        embedding_dim,
        *nested_addresses(nested),
    )


@kernel("embedding_8bit")
def embedding_8bit(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with rows of the table."""
    device = codes.get_device()
    rows, dim = codes.shape
    _native.embedding_8bit(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[out.dtype],
        indices.data_ptr(),
        indices.element_size(),
        indices.numel(),
        codes.data_ptr(),
        absmax.data_ptr(),
        rows,
        dim,
    )
