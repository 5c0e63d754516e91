"""Kernels of LLM.int8 (arXiv 2208.07339)."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core.ops.spec import INT8_ABSMAX_FLOOR, INT8_MAX
from bnb_reference import devices, kernel
from bnb_reference.blocks import row_pieces
from bnb_reference.matmul import matmul

#: How many columns are multiplied in float32 at a time. A product of two int8 codes is at most 2^14, so any sum of 1024 of them is
#: an integer of at most 2^24, which float32 holds exactly, whatever the order. Matrix units that round their float32 operands to
#: TF32 or bfloat16 hold the codes, of 8 bits, exactly as well. float64 would need no such care, but not every device has it.
EXACT_COLUMNS = 1024


@kernel("int8_quantize_rows")
def int8_quantize_rows(x: torch.Tensor, threshold: float, *, out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the codes, the absmax of each row, and which columns have an outlier."""
    codes, absmax, outlier_mask = out
    M, K = x.shape
    outlier_mask.zero_()
    for rows in row_pieces(M, K, x.device):
        regular, outliers = _split_outliers(x[rows], threshold)
        absmax[rows] = regular.abs().amax(1)
        outlier_mask |= outliers.any(0)
        codes[rows] = _quantize(regular, absmax[rows, None])
    codes.masked_fill_(outlier_mask, 0)


@kernel("int8_quantize_rows_cols")
def int8_quantize_rows_cols(
    x: torch.Tensor,
    threshold: float,
    *,
    out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fill `out` with the codes and absmax by rows, the codes and absmax by columns, and which columns have an outlier."""
    row_codes, row_absmax, col_codes, col_absmax, outlier_mask = out
    M, K = x.shape
    int8_quantize_rows(x, threshold, out=(row_codes, row_absmax, outlier_mask))
    col_absmax.zero_()
    for rows in row_pieces(M, K, x.device):
        regular, _ = _split_outliers(x[rows], threshold)
        torch.maximum(col_absmax, regular.abs().amax(0), out=col_absmax)
    for rows in row_pieces(M, K, x.device):
        regular, _ = _split_outliers(x[rows], threshold)
        col_codes[rows] = _quantize(regular, col_absmax)


@kernel("int8_matmul", dtypes=(torch.int8,))
def int8_matmul(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with a b^T."""
    out.zero_()
    a = a.float()
    for columns in (slice(k, k + EXACT_COLUMNS) for k in range(0, a.shape[1], EXACT_COLUMNS)):
        for rows in row_pieces(len(b), EXACT_COLUMNS, b.device):
            out[:, rows] += matmul(a[:, columns], b[rows, columns].float().t()).int()


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
    y = _scale(product, row_absmax, col_absmax)
    out.copy_(y if bias is None else y.add_(bias))


@kernel("int8_dequantize_rows")
def int8_dequantize_rows(codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with codes * (absmax / 127)."""
    M, K = codes.shape
    scales = row_scales(absmax)
    for rows in row_pieces(M, K, codes.device):
        out[rows] = codes[rows] * scales[rows]


@kernel("int8_linear")
def int8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: Optional[torch.Tensor],
    threshold: float,
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with x W^T + bias."""
    N, K = codes.shape
    x, out = x.view(-1, K), out.view(-1, N)
    x_codes = torch.empty_like(x, dtype=torch.int8)
    x_absmax = torch.empty(len(x), dtype=torch.float32, device=x.device)
    outlier_mask = torch.empty(K, dtype=torch.bool, device=x.device)
    int8_quantize_rows(x, threshold, out=(x_codes, x_absmax, outlier_mask))
    product = torch.empty(out.shape, dtype=torch.int32, device=x.device)
    int8_matmul(x_codes, codes, out=product)
    y = _scale(product, x_absmax, absmax)
    if threshold > 0:
        y += _outlier_product(x, codes, row_scales(absmax), outlier_mask)
    out.copy_(y if bias is None else y.add_(bias))


@kernel("int8_linear_transposed")
def int8_linear_transposed(g: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with g W."""
    N, K = codes.shape
    g = g.view(-1, N).float()
    scales = row_scales(absmax)
    total = torch.zeros(len(g), K, dtype=torch.float32, device=g.device)
    for rows in row_pieces(N, K, g.device):
        total.addmm_(g[:, rows], codes[rows] * scales[rows])
    out.copy_(total.view(out.shape))


def row_scales(absmax: torch.Tensor) -> torch.Tensor:
    """Return what a row's int8 codes are multiplied by, float32 [rows, 1]."""
    return absmax.view(-1, 1) * (1 / INT8_MAX)


def _split_outliers(x: torch.Tensor, threshold: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return x in float32 with 0 for what is not below the threshold, and where x reaches it; these differ for NaN."""
    x = x.float()
    if threshold == 0:
        return x, torch.zeros_like(x, dtype=torch.bool)
    magnitude = x.abs()
    return torch.where(magnitude < threshold, x, torch.zeros_like(x)), magnitude >= threshold


def _quantize(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Return x * (127 / absmax) rounded to integers, halves to even; 0 for NaN."""
    # Tensor over tensor is one IEEE division; number over tensor is a reciprocal and a product, which round twice.
    scale = torch.full_like(absmax, INT8_MAX).div_(absmax.clamp(min=INT8_ABSMAX_FLOOR))
    return torch.nan_to_num_(torch.round_(x * scale), nan=0.0)


def _scale(product: torch.Tensor, row_absmax: torch.Tensor, col_absmax: torch.Tensor) -> torch.Tensor:
    """Return product * row_absmax * col_absmax / 127^2 in float32."""
    # In this order, no intermediate result is far outside the range of the final ones.
    return (product * (row_absmax.view(-1, 1) / INT8_MAX**2)).mul_(col_absmax.view(1, -1))


def _outlier_product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, outlier_mask: torch.Tensor) -> torch.Tensor:
    """Multiply the outlier columns of x by those of the dequantized weight, in float32."""
    if devices.reads_are_free(x.device):
        columns = outlier_mask.nonzero().view(-1)
        return matmul(x.index_select(1, columns).float(), (codes.index_select(1, columns) * scales).t())
    # How many there are is known only on the device, and asking would wait for it: multiply all columns, the others as zeros.
    N, K = codes.shape
    outliers = torch.where(outlier_mask, x, torch.zeros_like(x)).float()
    y = torch.empty(len(x), N, dtype=torch.float32, device=x.device)
    for rows in row_pieces(N, K, x.device):
        y[:, rows] = matmul(outliers, (codes[rows] * scales[rows]).t())
    return y
