"""Kernels of LLM.int8()."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core.backends import Call
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import DTYPES, address, current_stream, kernel

#: The native module chooses the kernel; its `int8_paths` names what else may stand here.
_PATH = "automatic"


@kernel("int8_quantize_rows")
def int8_quantize_rows(x: torch.Tensor, threshold: float, *, out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the codes, the absmax of each row, and which columns have an outlier."""
    device = x.get_device()
    addresses = (tensor.data_ptr() for tensor in out)
    _native.int8_quantize_rows(device, current_stream(device), *addresses, DTYPES[x.dtype], x.data_ptr(), *x.shape, threshold)


@kernel("int8_quantize_rows_cols")
def int8_quantize_rows_cols(
    x: torch.Tensor,
    threshold: float,
    *,
    out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fill `out` with the codes and absmax by rows, the codes and absmax by columns, and which columns have an outlier."""
    device = x.get_device()
    addresses = (tensor.data_ptr() for tensor in out)
    _native.int8_quantize_rows_cols(device, current_stream(device), *addresses, DTYPES[x.dtype], x.data_ptr(), *x.shape, threshold)


@kernel("int8_matmul", dtypes=(torch.int8,))
def int8_matmul(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with a b^T."""
    device = a.get_device()
    M, K = a.shape
    _native.int8_matmul(device, current_stream(device), out.data_ptr(), a.data_ptr(), b.data_ptr(), M, b.shape[0], K, _PATH)


@kernel("int8_matmul_dequant")
def int8_matmul_dequant(
    product: torch.Tensor,
    row_absmax: torch.Tensor,
    col_absmax: torch.Tensor,
    bias: Optional[torch.Tensor],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with product * row_absmax * col_absmax / 127^2 + bias."""
    device = product.get_device()
    _native.int8_matmul_dequant(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[out.dtype],
        product.data_ptr(),
        row_absmax.data_ptr(),
        col_absmax.data_ptr(),
        address(bias),
        *product.shape,
    )


@kernel("int8_dequantize_rows")
def int8_dequantize_rows(codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with codes * (absmax / 127)."""
    device = codes.get_device()
    _native.int8_dequantize_rows(
        device, current_stream(device), out.data_ptr(), DTYPES[out.dtype], codes.data_ptr(), absmax.data_ptr(), *codes.shape
    )


def _linear_scratch(call: Call) -> int:
    K = call.codes.shape[1]
    size: int = _native.int8_linear_scratch(call.x.numel() // K, K)
    return size


@kernel("int8_linear", scratch=_linear_scratch)
def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: Optional[torch.Tensor],
    threshold: float,
    *,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with x W^T + bias."""
    device = x.get_device()
    N, K = codes.shape
    _native.int8_linear(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[x.dtype],
        x.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        address(bias),
        threshold,
        x.numel() // K,
        N,
        K,
        scratch.data_ptr(),
        _PATH,
    )


@kernel("int8_linear_transposed")
def int8_linear_transposed(g: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with g W."""
    device = g.get_device()
    N, K = codes.shape
    _native.int8_linear_transposed(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[g.dtype],
        g.data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        g.numel() // N,
        N,
        K,
    )
