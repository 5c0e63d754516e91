"""LLM.int8: codes to the bit and exact integer products, against numpy; scaled products within the documented bound."""

import numpy as np
import pytest
import torch
from bnb_reference import devices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnb_core import ops

#: Unit roundoff of each dtype.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def quantized(line, threshold):
    """Quantize one row or column by the definition; return its codes and its absmax."""
    magnitude = np.abs(line)
    below = magnitude < np.float32(threshold) if threshold else np.ones(len(line), bool)
    regular = magnitude[below]
    absmax = np.float32("nan") if np.isnan(regular).any() else regular.max(initial=np.float32(0))
    with np.errstate(all="ignore"):
        values = np.rint(line * (np.float32(127) / np.maximum(absmax, np.float32(2.0**-120))))
    return np.where(below & ~np.isnan(values), values, 0).astype(np.int8), absmax


def expected(x, threshold):
    """Return row codes, row absmax, column codes, column absmax and the mask, by the definition."""
    x = x.float().numpy()
    mask = (np.abs(x) >= np.float32(threshold)).any(0) if threshold else np.zeros(x.shape[1], bool)
    row_codes, row_absmax = zip(*(quantized(row, threshold) for row in x))
    col_codes, col_absmax = zip(*(quantized(col, threshold) for col in x.T))
    row_codes = np.where(mask, 0, np.stack(row_codes))
    return row_codes, np.array(row_absmax), np.stack(col_codes, 1), np.array(col_absmax), mask


def check_quantize(x, threshold):
    results = ops.int8_quantize_rows_cols(x, threshold)
    for found, wanted in zip(results, expected(x, threshold)):
        np.testing.assert_array_equal(found.numpy(), wanted)
    for found, wanted in zip(ops.int8_quantize_rows(x, threshold), (results[0], results[1], results[4])):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())


@pytest.mark.parametrize("threshold", [0.0, 0.75, 2.5, 6.0, float("inf")])
@pytest.mark.parametrize("shape", [(1, 1), (1, 130), (33, 5), (12, 77)])
def test_quantize(shape, threshold, dtype, pieces):
    x = (torch.randn(shape) * 10 ** (torch.rand(shape) * 4 - 3)).to(dtype)
    x[0, 0] = 6.0  # reaches a threshold of 6
    check_quantize(x, threshold)


def test_quantize_more_elements_than_a_piece():
    x = torch.randn(1100, 513)
    assert x.numel() > 1 << 19
    x[1099, 500] = 9.0
    check_quantize(x, 4.0)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e-45, 2.0**-126, 3.4028234e38, -0.0])
def test_quantize_special_values(value, threshold):
    x = torch.randn(5, 6)
    x[1, 2] = value
    x[3] = value
    check_quantize(x, threshold)
    check_quantize(x.t().contiguous(), threshold)


def test_outlier_columns_are_left_out_of_row_codes_alone():
    x = torch.tensor([[1.0, 8.0, -0.5], [2.0, 3.0, 1.0]])
    row_codes, row_absmax, col_codes, col_absmax, mask = ops.int8_quantize_rows_cols(x, 6.0)
    assert mask.tolist() == [False, True, False]
    assert row_absmax.tolist() == [1.0, 3.0]
    assert row_codes.tolist() == [[127, 0, -64], [85, 0, 42]]  # 63.5 and 42.33: halves go to the even code
    assert col_absmax.tolist() == [2.0, 3.0, 1.0]
    assert col_codes.tolist() == [[64, 0, -64], [127, 127, 127]]


def test_the_scale_is_a_correctly_rounded_quotient():
    # 127 times a reciprocal rounds twice, and gives other codes for some of these.
    absmax = torch.rand(20000) + 0.5
    ties = (torch.randint(0, 127, (20000,)) + 0.5) * (absmax.double() / 127).float()
    check_quantize(torch.stack((absmax, ties), 1), 0.0)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=6, max_size=6),
    threshold=st.one_of(st.just(0.0), st.floats(2.0**-10, 2.0**100, width=32)),
)
def test_quantize_any_values(values, threshold):
    check_quantize(torch.tensor(values).view(2, 3), threshold)


@pytest.mark.parametrize("K", [1, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize("fill", ["random", "largest", "smallest", "alternating"])
def test_integer_products_are_exact(K, fill, pieces):
    a = torch.randint(-128, 128, (5, K), dtype=torch.int8)
    b = torch.randint(-128, 128, (7, K), dtype=torch.int8)
    if fill == "largest":
        a.fill_(127), b.fill_(127)
    elif fill == "smallest":
        a.fill_(-128), b.fill_(-128)
    elif fill == "alternating":
        a[:, ::2], a[:, 1::2], b[:] = 127, -128, 127
    expected_product = torch.from_numpy(a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)
    assert torch.equal(ops.int8_matmul(a, b).long(), expected_product)


def test_integer_products_are_exact_under_autocast():
    a, b = torch.full((3, 700), 127, dtype=torch.int8), torch.full((2, 700), 126, dtype=torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.int8_matmul(a, b).eq(700 * 127 * 126).all()


def test_integer_products_of_many_rows():
    a = torch.randint(-127, 128, (3, 1100), dtype=torch.int8)
    b = torch.randint(-127, 128, (1025, 1100), dtype=torch.int8)
    assert torch.equal(ops.int8_matmul(a, b).long(), a.long() @ b.long().t())


def check_product(y, exact, magnitudes, K):
    """Compare in float64: |error| <= u |y| + 2^-24 (1 + K) sum |x||w|, as float32 with one rounding at the end reaches."""
    u = ROUNDOFF[y.dtype]
    error = (y.double() - exact).abs()
    bound = u * exact.abs() + 2.0**-24 * (1 + K) * magnitudes
    assert y.shape == exact.shape
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


@pytest.mark.parametrize("bias", [None, 0.3, -5000.0])
def test_matmul_dequant(bias, dtype):
    M, N = 21, 34
    product = torch.randint(2**18, 2**24, (M, N), dtype=torch.int32) * (1 - 2 * torch.randint(0, 2, (M, N), dtype=torch.int32))
    rows, cols = torch.rand(M) + 0.1, torch.rand(N) + 0.1
    biases = None if bias is None else (torch.randn(N) * bias).to(dtype)
    exact = product.double() * rows.double()[:, None] * cols.double() / 127**2
    y = ops.int8_matmul_dequant(product, rows, cols, biases, dtype)
    # Three roundings before that of the result.
    check_product(y, exact if biases is None else exact + biases.double(), exact.abs(), 2)


def test_matmul_dequant_of_extreme_scales():
    product = torch.tensor([[127 * 127, -(2**31)]], dtype=torch.int32)
    y = ops.int8_matmul_dequant(product, torch.tensor([1e30]), torch.tensor([1e8, 1e-35]), None, torch.float32)
    torch.testing.assert_close(y, torch.tensor([[1e38, -(2.0**31) * 1e-5 / 127**2]]), rtol=1e-6, atol=0)


def test_dequantize_rows(dtype, pieces):
    codes = torch.randint(-128, 128, (9, 41), dtype=torch.int8)
    absmax = torch.rand(9) * 10 ** (torch.rand(9) * 6 - 3)
    wanted = codes.numpy().astype(np.float32) * (absmax.numpy() * np.float32(1 / 127))[:, None]
    assert torch.equal(ops.int8_dequantize_rows(codes, absmax, dtype), torch.from_numpy(wanted).to(dtype))


def linear_in_float64(x, codes, absmax, bias, threshold):
    """Return LLM.int8's result from its exact parts, and sum |x||w|, in float64."""
    row_codes, row_absmax, _, _, mask = (torch.from_numpy(part) for part in expected(x, threshold))
    regular = row_codes.double() * row_absmax.double()[:, None] / 127
    outliers = torch.where(mask, x.double(), torch.zeros((), dtype=torch.float64))
    w = codes.double() * absmax.double()[:, None] / 127
    y = regular @ w.t() + outliers @ ops.int8_dequantize_rows(codes, absmax, torch.float32).double().t()
    return (y if bias is None else y + bias.double()), (regular.abs() + outliers.abs()) @ w.abs().t()


def check_linear(dtype, M, N, K, threshold, bias):
    x = torch.randn(M, K)
    x[:, : K // 5] *= 12
    x = x.to(dtype)
    codes, absmax, _ = ops.int8_quantize_rows(torch.randn(N, K))
    biases = torch.randn(N).to(dtype) * 10 if bias else None
    y = ops.int8_linear(x, codes, absmax, biases, threshold)
    check_product(y, *linear_in_float64(x, codes, absmax, biases, threshold), K)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0, 1e-3])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 2), (1, 40, 300), (17, 33, 1025), (6, 700, 810)])
def test_linear(M, N, K, threshold, bias, dtype):
    check_linear(dtype, M, N, K, threshold, bias)


@pytest.mark.parametrize("threshold", [6.0, 1e30])
def test_linear_without_reading_the_mask(threshold, dtype, pieces, host_reads_forbidden):
    check_linear(dtype, 7, 19, 120, threshold, bias=True)


def test_linear_keeps_infinite_outliers_apart(host_reads_forbidden):
    codes, absmax, _ = ops.int8_quantize_rows(torch.rand(3, 8) + 0.1)
    x = torch.randn(2, 8)
    x[0, 3] = float("inf")
    y = ops.int8_linear(x, codes, absmax, None, 6.0)
    assert torch.equal(y[0], torch.full((3,), float("inf")))
    assert y[1].isfinite().all()


@pytest.mark.parametrize("reads_are_free", [True, False])
def test_linear_takes_a_nan_below_no_threshold_for_zero(reads_are_free, monkeypatch):
    monkeypatch.setattr(devices, "reads_are_free", lambda device: reads_are_free)
    codes, absmax, _ = ops.int8_quantize_rows(torch.randn(3, 8))
    x = torch.randn(2, 8)
    x[0, 5] = 7.0
    without = x.clone()
    x[0, 3], without[0, 3] = float("nan"), 0.0
    assert torch.equal(ops.int8_linear(x, codes, absmax, None, 6.0), ops.int8_linear(without, codes, absmax, None, 6.0))


def test_linear_of_any_leading_shape(dtype):
    codes, absmax, _ = ops.int8_quantize_rows(torch.randn(5, 12))
    x = torch.randn(2, 3, 12).to(dtype)
    y = ops.int8_linear(x, codes, absmax, None, 0.0)
    assert y.shape == (2, 3, 5)
    assert torch.equal(y.view(6, 5), ops.int8_linear(x.view(6, 12), codes, absmax, None, 0.0))
    assert torch.equal(y[0, 0], ops.int8_linear(x[0, 0], codes, absmax, None, 0.0))


def test_linear_transposed(dtype, pieces):
    codes, absmax, _ = ops.int8_quantize_rows(torch.randn(45, 70))
    g = torch.randn(2, 4, 45).to(dtype)
    w = ops.int8_dequantize_rows(codes, absmax, torch.float32).double()
    check_product(ops.int8_linear_transposed(g, codes, absmax), g.double() @ w, g.double().abs() @ w.abs(), 45)


def test_autocast_does_not_lower_the_precision():
    codes, absmax, _ = ops.int8_quantize_rows(torch.randn(24, 96))
    x, g = torch.randn(4, 96) * 4, torch.randn(4, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, grad = ops.int8_linear(x, codes, absmax, None, 6.0), ops.int8_linear_transposed(g, codes, absmax)
    check_product(y, *linear_in_float64(x, codes, absmax, None, 6.0), 96)
    assert torch.equal(grad, ops.int8_linear_transposed(g, codes, absmax))
