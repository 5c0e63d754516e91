"""What each op must compute, worked out in numpy from the definitions in `bnb_core.ops.spec`: for clarity, not for speed.

Ops that are exact are computed in float32, one rounding at a time, up to the final rounding to the output's dtype. Products are
computed in float64 and come with sum |x| |w|, by which their bound is measured. No backend is called.

Values of float16 and bfloat16 come as float32 arrays, which hold them exactly.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import numpy as np

from bnb_core.ops.spec import ABSMAX_FLOOR, INT8_ABSMAX_FLOOR, INT8_MAX

Array = np.ndarray
_f32 = np.float32


class Product(NamedTuple):
    """A product, and what its error is measured by."""

    y: Array
    """float64."""
    magnitude: Array
    """sum |x| |w| of the terms of each element, without the bias; float64."""
    terms: int
    """K: float32 operations that an element may take one after the other."""


# ------------------------------------------------------------------------------------------------------------------------ blockwise


def nearest_codes(s: Array, codebook: Array) -> Array:
    """Return the code of the entry whose rank is the number of midpoints strictly below s; NaN counts as 0."""
    ranked = np.argsort(codebook, kind="stable")  # by value, and by code where values are equal
    entries = codebook[ranked]
    midpoints = (entries[:-1] + entries[1:]) * _f32(0.5)
    s = np.where(np.isnan(s), _f32(0), s)
    rank = np.zeros(s.shape, np.int64)
    for midpoint in midpoints:
        rank += midpoint < s
    return ranked[rank].astype(np.uint8)


@np.errstate(all="ignore")
def quantize_blockwise(x: Array, codebook: Array, blocksize: int) -> Tuple[Array, Array]:
    """Return the code of each element, uint8 of x's shape, and the absmax of each block."""
    blocks = -(-x.size // blocksize)
    padded = np.zeros(blocks * blocksize, _f32)
    padded[: x.size] = x.reshape(-1)
    rows = padded.reshape(blocks, blocksize)
    absmax = np.abs(rows).max(axis=1, initial=0)  # a NaN wins
    scale = _f32(1) / np.maximum(absmax, _f32(ABSMAX_FLOOR))
    codes = nearest_codes(rows * scale[:, None], codebook)
    return codes.reshape(-1)[: x.size].reshape(x.shape), absmax


def quantize_4bit(x: Array, codebook: Array, blocksize: int) -> Tuple[Array, Array]:
    """Return packed codes and the absmax of each block."""
    codes, absmax = quantize_blockwise(x.reshape(-1), codebook, blocksize)
    return pack(codes, codebook), absmax


def pack(codes: Array, codebook: Array) -> Array:
    """Put two codes in each byte, the first in the high nibble. A nibble left over holds the code of 0."""
    if codes.size % 2:
        codes = np.append(codes, nearest_codes(np.zeros(1, _f32), codebook))
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: Array, n: int) -> Array:
    """Undo `pack`, for n codes."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


@np.errstate(all="ignore")
def dequantize_blockwise(codes: Array, absmax: Array, codebook: Array, blocksize: int) -> Array:
    """Return codebook[code] * absmax, float32 of codes' shape."""
    scale = np.repeat(absmax, blocksize)[: codes.size].reshape(codes.shape)
    return codebook[codes] * scale


@np.errstate(all="ignore")
def nested_absmax(codes: Array, scales: Array, codebook: Array, offset: Array, blocksize: int) -> Array:
    """Recover block scales that were quantized themselves: a product and a sum, each rounded."""
    return dequantize_blockwise(codes, scales, codebook, blocksize) + _f32(offset)


# ------------------------------------------------------------------------------------------------------------------------- products


@np.errstate(all="ignore")
def product(x: Array, w: Array, bias: Optional[Array] = None) -> Product:
    """Multiply x [M, K] by w [N, K] transposed, and add the bias."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    y = x @ w.T
    if bias is not None:
        y = y + bias.astype(np.float64)
    return Product(y, np.abs(x) @ np.abs(w).T, x.shape[1])


def grouped_product(x: Array, experts: Array, offsets: Array) -> Product:
    """Multiply tokens offsets[e] to offsets[e+1] of x [tokens, K] by experts[e] [N, K] transposed."""
    y = np.zeros((x.shape[0], experts.shape[1]))
    magnitude = np.zeros_like(y)
    for weight, start, stop in zip(experts, offsets[:-1], offsets[1:]):
        y[start:stop], magnitude[start:stop], _ = product(x[start:stop], weight)
    return Product(y, magnitude, x.shape[1])


# ------------------------------------------------------------------------------------------------------------------------- LLM.int8

#: Scaling a product takes four float32 operations whatever K is: two scales, 1/127^2, and the bias or the outlier columns.
_SCALING = 4


@np.errstate(all="ignore")
def _int8_codes(x: Array, absmax: Array) -> Array:
    scale = _f32(INT8_MAX) / np.maximum(absmax, _f32(INT8_ABSMAX_FLOOR))
    codes = np.rint(x * scale)  # halves to even
    return np.where(np.isnan(codes), _f32(0), codes).astype(np.int8)


def int8_quantize_rows(x: Array, threshold: float) -> Tuple[Array, Array, Array]:
    """Return codes, the absmax of each row and the mask of outlier columns."""
    magnitude = np.abs(x)
    quantized = magnitude < threshold if threshold > 0 else np.ones(x.shape, bool)
    outliers = magnitude >= threshold if threshold > 0 else np.zeros(x.shape, bool)
    absmax = np.where(quantized, magnitude, _f32(0)).max(axis=1, initial=0)
    codes = _int8_codes(x, absmax[:, None])
    outlier_columns = np.any(outliers, axis=0)
    codes[:, outlier_columns] = 0
    return codes, absmax, outlier_columns


def int8_quantize_rows_cols(x: Array, threshold: float) -> Tuple[Array, Array, Array, Array, Array]:
    """Return row codes and absmax, column codes and absmax, and the mask of outlier columns."""
    row_codes, row_absmax, outlier_columns = int8_quantize_rows(x, threshold)
    magnitude = np.abs(x)
    quantized = magnitude < threshold if threshold > 0 else np.ones(x.shape, bool)
    inliers = np.where(quantized, x, _f32(0))
    col_absmax = np.abs(inliers).max(axis=0, initial=0)
    return row_codes, row_absmax, _int8_codes(inliers, col_absmax), col_absmax, outlier_columns


def int8_matmul(a: Array, b: Array) -> Array:
    """Multiply a [M, K] by b [N, K] transposed, exactly."""
    exact = a.astype(np.int64) @ b.astype(np.int64).T
    assert np.abs(exact).max(initial=0) < 2**31, "the case does not fit int32"
    return exact.astype(np.int32)


@np.errstate(all="ignore")
def int8_dequantize(codes: Array, absmax: Array) -> Array:
    """Return codes * (absmax * (1/127)) by rows, rounding after each, float32."""
    return codes.astype(_f32) * (absmax * _f32(1 / INT8_MAX))[:, None]


@np.errstate(all="ignore")
def int8_matmul_dequant(integers: Array, row_absmax: Array, col_absmax: Array, bias: Optional[Array]) -> Product:
    """Scale an integer product by row and column absmax, over 127^2, and add the bias."""
    scale = row_absmax.astype(np.float64)[:, None] * col_absmax.astype(np.float64) / INT8_MAX**2
    y = integers * scale
    magnitude = np.abs(y)
    if bias is not None:
        y = y + bias.astype(np.float64)
    return Product(y, magnitude, _SCALING)


def int8_linear(x: Array, codes: Array, absmax: Array, bias: Optional[Array], threshold: float) -> Product:
    """Quantize the rows of x, multiply, add the outlier columns of x times the dequantized weight, and add the bias."""
    x_codes, x_absmax, outlier_columns = int8_quantize_rows(x, threshold)
    scaled = int8_matmul_dequant(int8_matmul(x_codes, codes), x_absmax, absmax, bias)
    terms = int8_matmul_dequant(np.abs(x_codes.astype(np.int64)) @ np.abs(codes.astype(np.int64)).T, x_absmax, absmax, None)
    outliers = product(x[:, outlier_columns], int8_dequantize(codes, absmax)[:, outlier_columns])
    return Product(scaled.y + outliers.y, terms.y + outliers.magnitude, max(x.shape[1], _SCALING))


def int8_linear_transposed(g: Array, codes: Array, absmax: Array) -> Product:
    """Multiply g [M, N] by the dequantized weight [N, K]."""
    y, magnitude, terms = product(g, int8_dequantize(codes, absmax).T)
    return Product(y, magnitude, max(terms, _SCALING))
