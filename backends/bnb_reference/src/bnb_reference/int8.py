"""Kernels of LLM.int8 (arXiv 2208.07339)."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core.ops.spec import INT8_ABSMAX_FLOOR, INT8_MAX
from bnb_reference import kernel
from bnb_reference.blocks import piece_size
from bnb_reference.matmul import matmul

#: Columns that are multiplied at a time. A product of two int8 codes is at most 2^14, so that every partial sum of 1024 of them is
#: an integer of at most 2^24: exact in float32, in any order. TF32 and bfloat16 multipliers hold int8 codes exactly too.
EXACT_COLUMNS = 1024


@kernel("int8_quantize_rows")
def int8_quantize_rows(x: torch.Tensor, threshold: float, *, out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with codes, row absmax and the mask of outlier columns."""
    codes, absmax, outlier_mask = out
    x, outliers = _split_outliers(x, threshold)
    outlier_mask.copy_(outliers.any(0))
    absmax.copy_(x.abs().amax(1))
    codes.copy_(_quantize(x, absmax[:, None]).masked_fill_(outlier_mask, 0))


@kernel("int8_quantize_rows_cols")
def int8_quantize_rows_cols(
    x: torch.Tensor,
    threshold: float,
    *,
    out: Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fill `out` with row codes and absmax, column codes and absmax, and the mask of outlier columns."""
    row_codes, row_absmax, col_codes, col_absmax, outlier_mask = out
    x, outliers = _split_outliers(x, threshold)
    outlier_mask.copy_(outliers.any(0))
    row_absmax.copy_(x.abs().amax(1))
    col_absmax.copy_(x.abs().amax(0))
    row_codes.copy_(_quantize(x, row_absmax[:, None]).masked_fill_(outlier_mask, 0))
    col_codes.copy_(_quantize(x, col_absmax))


@kernel("int8_matmul", dtypes=(torch.int8,))
def int8_matmul(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with a b^T."""
    out.zero_()
    step = max(1, piece_size(b.device) // EXACT_COLUMNS)
    for k in range(0, a.shape[1], EXACT_COLUMNS):
        columns = a[:, k : k + EXACT_COLUMNS].float()
        for n in range(0, b.shape[0], step):
            panel = b[n : n + step, k : k + EXACT_COLUMNS].float()
            out[:, n : n + step] += matmul(columns, panel.t()).int()


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
    torch.mul(codes, row_scales(absmax), out=out)


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
    x, out = x.view(-1, codes.shape[1]), out.view(-1, codes.shape[0])
    x_codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    x_absmax = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    outlier_mask = torch.empty(x.shape[1], dtype=torch.bool, device=x.device)
    int8_quantize_rows(x, threshold, out=(x_codes, x_absmax, outlier_mask))
    product = torch.empty(out.shape, dtype=torch.int32, device=x.device)
    int8_matmul(x_codes, codes, out=product)
    y = _scale(product, x_absmax, absmax)
    if threshold > 0:
        if x.device.type == "cpu":
            columns = outlier_mask.nonzero().view(-1)
            outliers, weight = x.index_select(1, columns), codes.index_select(1, columns)
        else:  # how many columns are outliers is known only on the device, and asking would wait for it
            outliers, weight = torch.where(outlier_mask, x, torch.zeros_like(x)), codes
        y += matmul(outliers.float(), (weight * row_scales(absmax)).t())
    out.copy_(y if bias is None else y.add_(bias))


@kernel("int8_linear_transposed")
def int8_linear_transposed(g: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, out: torch.Tensor) -> None:
    """Fill `out` with g W."""
    N, K = codes.shape
    g = g.view(-1, N).float()
    total = torch.zeros(g.shape[0], K, dtype=torch.float32, device=g.device)
    scales = row_scales(absmax)
    step = max(1, piece_size(codes.device) // K)
    for n in range(0, N, step):
        total += matmul(g[:, n : n + step], codes[n : n + step] * scales[n : n + step])
    out.copy_(total.view(out.shape))


def row_scales(absmax: torch.Tensor) -> torch.Tensor:
    """Return what a row's int8 codes are multiplied by, float32 [rows, 1]."""
    return (absmax.view(-1) * (1 / INT8_MAX))[:, None]


def _split_outliers(x: torch.Tensor, threshold: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return x in float32 with 0 for the elements that are not quantized, and which of them reach the threshold."""
    x = x.float()
    if threshold == 0:
        return x, torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    magnitude = x.abs()
    # A NaN is not below the threshold either; its code is 0 as well.
    return torch.where(magnitude < threshold, x, torch.zeros_like(x)), magnitude >= threshold


def _quantize(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Round x * (127 / absmax) to integers, halves to even; 0 for NaN."""
    # Tensor over tensor is one IEEE division; number over tensor is a reciprocal and a product, which round twice.
    scale = torch.full_like(absmax, INT8_MAX).div_(absmax.clamp(min=INT8_ABSMAX_FLOOR))
    return torch.nan_to_num_(torch.round_(x * scale), nan=0.0)


def _scale(product: torch.Tensor, row_absmax: torch.Tensor, col_absmax: torch.Tensor) -> torch.Tensor:
    """Return product * row_absmax * col_absmax / 127^2 in float32."""
    return (row_absmax.view(-1, 1) * col_absmax.view(1, -1)).mul_(product).div_(INT8_MAX**2)
