"""The parts of LLM.int8() (arXiv 2208.07339) one by one: quantize rows, multiply, dequantize.

Functions with a threshold return the indices of outlier columns, as bitsandbytes does. How many there are is only known once the
device has counted them, so these functions synchronize with it when the threshold is positive. The ops below them return a mask
and do not (`bnb_core.ops.int8_quantize_rows`), and `bnb_core.ops.int8_linear` does all the parts in one call.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.quantization.outputs import deliver


def int8_vectorwise_quant(A: torch.Tensor, threshold: float = 0.0) -> Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """Quantize rows to int8, leaving out outlier columns. Synchronizes with the device if the threshold is positive.

    Args:
        A: float32, float16 or bfloat16 [..., K].
        threshold: a column with any |x| >= threshold is an outlier column; 0.0 for none.

    Returns:
        Codes, int8 of A's shape, 0 in outlier columns; absmax, float32 [rows], over the elements below the threshold; and the
        indices of outlier columns, int64, in ascending order, or None if the threshold is 0.0.

    Raises:
        InvalidArgumentError: a dtype, shape or threshold that is not accepted.
    """
    codes, absmax, outliers = ops.int8_quantize_rows(as_rows("int8_vectorwise_quant", "A", A), threshold)
    return codes.view(A.shape), absmax, _indices(outliers, threshold)


def int8_double_quant(
    A: torch.Tensor,
    col_stats: Optional[torch.Tensor] = None,
    row_stats: Optional[torch.Tensor] = None,
    out_col: Optional[torch.Tensor] = None,
    out_row: Optional[torch.Tensor] = None,
    threshold: float = 0.0,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """Quantize to int8 by rows and by columns. Synchronizes with the device if the threshold is positive.

    Args:
        A: float32, float16 or bfloat16 [..., K].
        col_stats, row_stats: tensors to fill with the absmax instead of new ones: float32 [K] and float32 [rows].
        out_col, out_row: tensors to fill with the codes instead of new ones: int8 of A's shape.
        threshold: elements with |x| >= threshold are outliers; 0.0 for none.

    Returns:
        Row codes, 0 in outlier columns; column codes, 0 at outliers; row absmax; column absmax; and the indices of columns with
        outliers, int64, in ascending order, or None if the threshold is 0.0.

    Raises:
        InvalidArgumentError: a dtype, shape, device or threshold that is not accepted.
    """
    function = "int8_double_quant"
    by_row, row_absmax, by_col, col_absmax, outliers = ops.int8_quantize_rows_cols(as_rows(function, "A", A), threshold)
    return (
        deliver(function, by_row.view(A.shape), out_row, "out_row"),
        deliver(function, by_col.view(A.shape), out_col, "out_col"),
        deliver(function, row_absmax, row_stats, "row_stats"),
        deliver(function, col_absmax, col_stats, "col_stats"),
        _indices(outliers, threshold),
    )


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Dequantize int8 rows.

    Args:
        A: int8 [..., K].
        stats: the absmax of each row, float32 [rows].

    Returns:
        float32 of A's shape.

    Raises:
        InvalidArgumentError: a dtype, shape or device that is not accepted.
    """
    return ops.int8_dequantize_rows(as_rows("int8_vectorwise_dequant", "A", A), stats, torch.float32).view(A.shape)


def int8_linear_matmul(
    A: torch.Tensor, B: torch.Tensor, out: Optional[torch.Tensor] = None, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Multiply int8 matrices exactly: A B^T.

    Args:
        A: int8 [..., K].
        B: int8 [N, K].
        out: tensor to fill instead of a new one.
        dtype: of the result; only int32 can hold it.

    Returns:
        int32 [..., N].

    Raises:
        InvalidArgumentError: a dtype, shape or device that is not accepted.
    """
    function = "int8_linear_matmul"
    if dtype != torch.int32:
        raise InvalidArgumentError(f"{function}: dtype is {dtype}; the products are exact only in torch.int32")
    product = ops.int8_matmul(as_rows(function, "A", A), B)
    return deliver(function, product.view(*A.shape[:-1], B.shape[0]), out)


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Scale an int32 product of int8 codes: A * row_stats * col_stats / 127^2 + bias.

    Args:
        A: int32 [..., N].
        row_stats: absmax of the rows of the first factor, float32 [rows].
        col_stats: absmax of the rows of the second factor, float32 [N].
        out: tensor to fill instead of a new one: float16, float32 or bfloat16 of A's shape.
        bias: float32, float16 or bfloat16 [N].

    Returns:
        float16, or the dtype of `out`, of A's shape.

    Raises:
        InvalidArgumentError: a dtype, shape or device that is not accepted.
    """
    function = "int8_mm_dequant"
    dtype = torch.float16 if out is None else out.dtype
    # A bias of another dtype is added in float32, before the one rounding that counts.
    computed = dtype if bias is None or bias.dtype == dtype else torch.float32
    bias = None if bias is None else bias.to(computed)
    result = ops.int8_matmul_dequant(as_rows(function, "A", A), row_stats, col_stats, bias, computed)
    return deliver(function, result.to(dtype).view(A.shape), out)


def as_rows(function: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor [..., K] as a matrix [rows, K]."""
    if tensor.dim() == 0:
        raise InvalidArgumentError(f"{function}: {name} has no dimensions; its last one must be that of the columns")
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _indices(mask: torch.Tensor, threshold: float) -> Optional[torch.Tensor]:
    return mask.nonzero().view(-1) if threshold > 0.0 else None
