"""Kernels of 4-bit quantization."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import DTYPES, current_stream, kernel, nested_addresses


@kernel("quantize_4bit")
def quantize_4bit(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the packed codes and the absmax of each block."""
    device = x.get_device()
    packed, absmax = out
    _native.quantize_4bit(
        device,
        current_stream(device),
        packed.data_ptr(),
        absmax.data_ptr(),
        x.data_ptr(),
        DTYPES[x.dtype],
        x.numel(),
        codebook.data_ptr(),
        blocksize,
    )


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
    device = packed.get_device()
    _native.dequantize_4bit(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[out.dtype],
        out.numel(),
        packed.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        blocksize,
        *nested_addresses(nested),
    )
