"""Kernels of 8-bit blockwise quantization."""

from __future__ import annotations

from typing import Tuple

import torch

from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import DTYPES, current_stream, kernel


@kernel("quantize_blockwise")
def quantize_blockwise(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the code of each element and the absmax of each block."""
    device = x.get_device()
    codes, absmax = out
    _native.quantize_blockwise(
        device,
        current_stream(device),
        codes.data_ptr(),
        absmax.data_ptr(),
        x.data_ptr(),
        DTYPES[x.dtype],
        x.numel(),
        codebook.data_ptr(),
        blocksize,
    )


@kernel("dequantize_blockwise")
def dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: torch.Tensor
) -> None:
    """Fill `out` with codebook[code] * absmax."""
    device = codes.get_device()
    _native.dequantize_blockwise(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[out.dtype],
        out.numel(),
        codes.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        blocksize,
    )
