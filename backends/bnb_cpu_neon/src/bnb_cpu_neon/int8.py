"""int8 ops: each hands its tensors to the native kernel of the same name."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core.backends import Call
from bnb_cpu_neon import engine
from bnb_cpu_neon.engine import DTYPES, kernel

_FLOAT = 4


@kernel("int8_quantize_rows")
def int8_quantize_rows(x: torch.Tensor, threshold: float, *, out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the codes, the absmax of each row, and which columns have an outlier."""
    engine.native.int8_quantize_rows(DTYPES[x.dtype], x, *x.shape, threshold, *out, torch.get_num_threads())


@kernel("int8_quantize_rows_cols")
def int8_quantize_rows_cols(
    x: torch.Tensor,
    threshold: float,
    *,
    out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fill `out` with the codes and absmax by rows, the codes and absmax by columns, and which columns have an outlier."""
    engine.native.int8_quantize_rows_cols(DTYPES[x.dtype], x, *x.shape, threshold, *out, torch.get_num_threads())


def _matmul_scratch(call: Call) -> int:
    return int(engine.native.int8_matmul_scratch(*call.a.shape))


@kernel("int8_matmul", dtypes=(torch.int8,), scratch=_matmul_scratch)
def int8_matmul(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, scratch: torch.Tensor) -> None:
    """Fill `out` with a b^T."""
    engine.native.int8_matmul(a, b, *out.shape, a.shape[1], out, scratch, torch.get_num_threads())


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
    engine.native.int8_matmul_dequant(
        product, row_absmax, col_absmax, bias, *out.shape, DTYPES[out.dtype], out, torch.get_num_threads()
    )


@kernel("int8_dequantize_rows")
def int8_dequantize_rows(codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with codes * (absmax / 127)."""
    engine.native.int8_dequantize_rows(codes, absmax, *out.shape, DTYPES[out.dtype], out, torch.get_num_threads())


def _linear_scratch(call: Call) -> int:
    K = call.codes.shape[1]
    return int(engine.native.int8_linear_scratch(call.x.numel() // K, K, call.threshold))


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
    N, K = codes.shape
    engine.native.int8_linear(
        DTYPES[x.dtype], x, x.numel() // K, codes, absmax, N, K, bias, threshold, out, scratch, torch.get_num_threads()
    )


def _linear_transposed_scratch(call: Call) -> int:
    N = call.codes.shape[0]
    return _FLOAT * int(engine.native.int8_linear_transposed_scratch(call.g.numel() // N, N))


@kernel("int8_linear_transposed", scratch=_linear_transposed_scratch)
def int8_linear_transposed(
    g: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Fill `out` with g W."""
    N, K = codes.shape
    engine.native.int8_linear_transposed(
        DTYPES[g.dtype], g, g.numel() // N, codes, absmax, N, K, out, scratch, torch.get_num_threads()
    )
