"""LLM.int8 ops (arXiv 2208.07339): shapes, checks, derivatives and signatures."""

from __future__ import annotations

from typing import Any, Optional, Sequence, Tuple

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops import checks
from bnb_core.ops.indices import check_index_values, require_indices
from bnb_core.ops.outputs import Output
from bnb_core.ops.structured import StructuredOp


def _require_threshold(op: str, threshold: float) -> None:
    if not threshold >= 0.0:
        raise InvalidArgumentError(f"{op}: threshold is {threshold}; it must be 0.0 (no outliers) or positive")


def _check_weight(op: str, codes: torch.Tensor, absmax: torch.Tensor) -> None:
    checks.require_dtype(op, "codes", codes, torch.int8)
    checks.require_matrix(op, "codes", codes)
    checks.require_row_scales(op, absmax, codes.shape[0])


def _quantize_rows_meta(x: torch.Tensor, threshold: float) -> Sequence[Output]:
    op = "int8_quantize_rows"
    checks.require_float(op, "x", x)
    checks.require_matrix(op, "x", x)
    _require_threshold(op, threshold)
    return (x.shape, torch.int8), ((x.shape[0],), torch.float32), ((x.shape[1],), torch.bool)


def _quantize_rows_cols_meta(x: torch.Tensor, threshold: float) -> Sequence[Output]:
    op = "int8_quantize_rows_cols"
    checks.require_float(op, "x", x)
    checks.require_matrix(op, "x", x)
    _require_threshold(op, threshold)
    rows, cols = x.shape
    return (
        (x.shape, torch.int8),
        ((rows,), torch.float32),
        (x.shape, torch.int8),
        ((cols,), torch.float32),
        ((cols,), torch.bool),
    )


def _matmul_meta(a: torch.Tensor, b: torch.Tensor) -> Sequence[Output]:
    op = "int8_matmul"
    for name, tensor in (("a", a), ("b", b)):
        checks.require_dtype(op, name, tensor, torch.int8)
        checks.require_matrix(op, name, tensor)
    if a.shape[1] != b.shape[1]:
        raise InvalidArgumentError(f"{op}: a has shape {list(a.shape)} and b {list(b.shape)}; their last dimensions must be equal")
    return (((a.shape[0], b.shape[0]), torch.int32),)


def _matmul_dequant_meta(
    product: torch.Tensor, row_absmax: torch.Tensor, col_absmax: torch.Tensor, bias: Optional[torch.Tensor], dtype: torch.dtype
) -> Sequence[Output]:
    op = "int8_matmul_dequant"
    checks.require_dtype(op, "product", product, torch.int32)
    checks.require_matrix(op, "product", product)
    checks.require_row_scales(op, row_absmax, product.shape[0], "row_absmax")
    checks.require_row_scales(op, col_absmax, product.shape[1], "col_absmax")
    checks.require_float_dtype(op, dtype)
    checks.require_bias(op, bias, product.shape[1], dtype)
    return ((product.shape, dtype),)


def _dequantize_rows_meta(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> Sequence[Output]:
    op = "int8_dequantize_rows"
    _check_weight(op, codes, absmax)
    checks.require_float_dtype(op, dtype)
    return ((codes.shape, dtype),)


def _linear_meta(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, bias: Optional[torch.Tensor], threshold: float
) -> Sequence[Output]:
    op = "int8_linear"
    _check_weight(op, codes, absmax)
    _require_threshold(op, threshold)
    rows, cols = codes.shape
    checks.require_features(op, "x", x, cols)
    checks.require_bias(op, bias, rows, x.dtype)
    return (((*x.shape[:-1], rows), x.dtype),)


def _linear_transposed_meta(g: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> Sequence[Output]:
    op = "int8_linear_transposed"
    _check_weight(op, codes, absmax)
    rows, cols = codes.shape
    checks.require_features(op, "g", g, rows)
    return (((*g.shape[:-1], cols), g.dtype),)


def _linear_transposed_adjoint(grad: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    # int8_linear would quantize the gradient; the exact adjoint multiplies by the dequantized weight, in float32 as the op does.
    return torch.nn.functional.linear(grad.float(), int8_dequantize_rows(codes, absmax, torch.float32)).to(grad.dtype)


def _embedding_meta(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> Sequence[Output]:
    op = "embedding_8bit"
    require_indices(op, indices)
    _check_weight(op, codes, absmax)
    checks.require_float_dtype(op, dtype)
    return (((*indices.shape, codes.shape[1]), dtype),)


def _check_embedding_values(indices: torch.Tensor, codes: torch.Tensor, *rest: Any) -> None:
    check_index_values("embedding_8bit", indices, codes.shape[0])


_quantize_rows = StructuredOp("int8_quantize_rows", _quantize_rows_meta)
_quantize_rows_cols = StructuredOp("int8_quantize_rows_cols", _quantize_rows_cols_meta)
_matmul = StructuredOp("int8_matmul", _matmul_meta)
_matmul_dequant = StructuredOp("int8_matmul_dequant", _matmul_dequant_meta)
_dequantize_rows = StructuredOp("int8_dequantize_rows", _dequantize_rows_meta)
# Not `rowwise`: which columns are outlier columns depends on every row.
_linear = StructuredOp("int8_linear", _linear_meta, adjoint="int8_linear_transposed")
_linear_transposed = StructuredOp(
    "int8_linear_transposed", _linear_transposed_meta, adjoint=_linear_transposed_adjoint, rowwise=True
)
_embedding = StructuredOp("embedding_8bit", _embedding_meta, rowwise=True, check_values=_check_embedding_values)


def int8_quantize_rows(
    x: torch.Tensor, threshold: float = 0.0, *, out: Optional[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = None
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows to int8, leaving out outlier columns.

    Args:
        x: float32, float16 or bfloat16 [M, K].
        threshold: a column with any |x| >= threshold is an outlier column; 0.0 for none.
        out: tensors to fill instead of new ones.

    Returns:
        codes, int8 [M, K], 0 in outlier columns; absmax, float32 [M], over the elements below the threshold; and outlier_mask,
        bool [K].

    Raises:
        InvalidArgumentError: a dtype, shape or threshold that is not accepted.
    """
    return _quantize_rows.call((x, threshold), out)


def int8_quantize_rows_cols(
    x: torch.Tensor, threshold: float = 0.0
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize to int8 by rows, as `int8_quantize_rows` does, and by columns.

    Args:
        x: float32, float16 or bfloat16 [M, K].
        threshold: elements with |x| >= threshold are outliers; 0.0 for none.

    Returns:
        row_codes, int8 [M, K]; row_absmax, float32 [M]; col_codes, int8 [M, K], 0 at outliers; col_absmax, float32 [K]; and
        outlier_mask, bool [K].

    Raises:
        InvalidArgumentError: a dtype, shape or threshold that is not accepted.
    """
    return _quantize_rows_cols.call((x, threshold))


def int8_matmul(a: torch.Tensor, b: torch.Tensor, *, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Multiply int8 matrices exactly: a b^T.

    Args:
        a: int8 [M, K].
        b: int8 [N, K].
        out: tensor to fill instead of a new one.

    Returns:
        int32 [M, N].

    Raises:
        InvalidArgumentError: a dtype or shape that is not accepted.
    """
    return _matmul.call((a, b), out)


def int8_matmul_dequant(
    product: torch.Tensor,
    row_absmax: torch.Tensor,
    col_absmax: torch.Tensor,
    bias: Optional[torch.Tensor],
    dtype: torch.dtype,
    *,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Scale an int32 product: product * row_absmax * col_absmax / 127^2 + bias.

    Args:
        product: int32 [M, N].
        row_absmax: float32 [M].
        col_absmax: float32 [N].
        bias: [N] of `dtype`.
        dtype: float32, float16 or bfloat16.
        out: tensor to fill instead of a new one.

    Returns:
        [M, N] of `dtype`.

    Raises:
        InvalidArgumentError: a dtype, shape or device that is not accepted.
    """
    return _matmul_dequant.call((product, row_absmax, col_absmax, bias, dtype), out)


def int8_dequantize_rows(
    codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype, *, out: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Dequantize int8 rows: codes * (absmax / 127).

    Args:
        codes: int8 [M, K].
        absmax: float32 [M].
        dtype: float32, float16 or bfloat16.
        out: tensor to fill instead of a new one.

    Returns:
        [M, K] of `dtype`.

    Raises:
        InvalidArgumentError: a dtype, shape or device that is not accepted.
    """
    return _dequantize_rows.call((codes, absmax, dtype), out)


def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    threshold: float = 0.0,
    *,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Apply an int8 weight the LLM.int8 way, in one call and without synchronizing. Differentiable in x and bias.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        codes: int8 [N, K].
        absmax: float32 [N].
        bias: [N] in x's dtype.
        threshold: columns of x with any |x| >= threshold are multiplied in x's dtype; 0.0 for none.
        out: tensor to fill instead of a new one; not differentiable then.

    Returns:
        [..., N] in x's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape, device or threshold that is not accepted.
    """
    return _linear.call((x, codes, absmax, bias, threshold), out)


def int8_linear_transposed(
    g: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Multiply by a dequantized int8 weight: g W. The gradient of `int8_linear` in x.

    Args:
        g: float32, float16 or bfloat16 [..., N].
        codes: int8 [N, K].
        absmax: float32 [N].
        out: tensor to fill instead of a new one; not differentiable then.

    Returns:
        [..., K] in g's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape or device that is not accepted.
    """
    return _linear_transposed.call((g, codes, absmax), out)


def embedding_8bit(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize the rows of an int8 table that `indices` name.

    Args:
        indices: int32 or int64, any shape, each in [0, num_embeddings); checked on the CPU, where reading them is free.
        codes: int8 [num_embeddings, embedding_dim].
        absmax: float32 [num_embeddings].
        dtype: float32, float16 or bfloat16.

    Returns:
        [..., embedding_dim] of `dtype`.

    Raises:
        InvalidArgumentError: a dtype, shape, device or index that is not accepted.
    """
    return _embedding.call((indices, codes, absmax, dtype))
