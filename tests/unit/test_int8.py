"""The parts of LLM.int8() as users call them."""

import pytest
import torch

from bnb_core import functional as F
from bnb_core.errors import InvalidArgumentError

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("shape", [(5,), (1, 1), (17, 33), (2, 3, 20)], ids=str)
def test_rows_are_quantized_to_the_nearest_code(dtype, shape):
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    codes, absmax, outliers = F.int8_vectorwise_quant(x)
    assert torch.equal(x, before)
    assert outliers is None
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    rows = x.reshape(-1, shape[-1]).double()
    assert torch.equal(absmax.double(), rows.abs().amax(1))
    exact = rows * (127 / absmax.double())[:, None]
    assert ((codes.view(rows.shape) - exact).abs() <= 0.50001).all()
    y = F.int8_vectorwise_dequant(codes, absmax)
    assert y.dtype == torch.float32
    assert y.shape == x.shape
    assert ((y.view(rows.shape).double() - rows).abs() <= 0.50001 / 127 * absmax.double()[:, None]).all()


def test_outlier_columns_are_left_out():
    x = torch.rand(6, 10) - 0.5
    x[2, 7], x[4, 1] = 6.0, -9.0  # at the threshold counts
    before = x.clone()
    codes, absmax, outliers = F.int8_vectorwise_quant(x, threshold=6.0)
    assert torch.equal(x, before)
    assert outliers.dtype == torch.int64
    assert outliers.tolist() == [1, 7]
    assert (codes[:, outliers] == 0).all()
    assert torch.equal(absmax, x.masked_fill(x.abs() >= 6, 0).abs().amax(1))
    assert (codes[:, [0, 2, 3]] != 0).any()


def test_no_outliers_are_an_empty_tensor_and_no_threshold_is_none():
    x = torch.rand(3, 4)
    assert F.int8_vectorwise_quant(x, threshold=6.0)[2].shape == (0,)
    assert F.int8_vectorwise_quant(x)[2] is None
    assert F.int8_double_quant(x, threshold=6.0)[4].shape == (0,)
    assert F.int8_double_quant(x)[4] is None


@dtypes
def test_double_quant_is_by_rows_and_by_columns(dtype):
    x = (torch.rand(6, 10) - 0.5).to(dtype)
    x[2, 7] = 8.0
    by_row, by_col, row_absmax, col_absmax, outliers = F.int8_double_quant(x, threshold=6.0)
    expected = F.int8_vectorwise_quant(x, threshold=6.0)
    assert torch.equal(by_row, expected[0])
    assert torch.equal(row_absmax, expected[1])
    assert torch.equal(outliers, expected[2])
    inliers = x.masked_fill(x.abs() >= 6, 0)
    codes, absmax, _ = F.int8_vectorwise_quant(inliers.t().contiguous())
    assert torch.equal(by_col, codes.t())
    assert torch.equal(col_absmax, absmax)


def test_double_quant_fills_given_outputs():
    x = torch.randn(5, 9)
    expected = F.int8_double_quant(x)
    given = {
        "out_row": torch.zeros(5, 9, dtype=torch.int8),
        "out_col": torch.zeros(9, 5, dtype=torch.int8).t(),
        "row_stats": torch.zeros(5),
        "col_stats": torch.zeros(9),
    }
    results = F.int8_double_quant(x, **given)
    for name, result, value in zip(given, results, expected):
        assert result is given[name]
        assert torch.equal(result, value)


@pytest.mark.parametrize("K", [1, 64, 4096])
def test_integer_products_are_exact(K):
    a = torch.randint(-127, 128, (2, 3, K), dtype=torch.int8)
    a[0, 0] = 127
    b = torch.randint(-127, 128, (5, K), dtype=torch.int8)
    b[0] = 127
    expected = (a.long() @ b.long().t()).int()
    assert torch.equal(F.int8_linear_matmul(a, b), expected)
    out = torch.zeros(5, 3, 2, dtype=torch.int32).permute(2, 1, 0)
    assert F.int8_linear_matmul(a, b, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_are_scaled(dtype, bias_dtype):
    product = torch.randint(-(2**20), 2**20, (2, 4, 6), dtype=torch.int32)
    rows, cols = torch.rand(8), torch.rand(6)
    bias = None if bias_dtype is None else torch.randn(6).to(bias_dtype)
    out = None if dtype is None else torch.zeros(2, 4, 6, dtype=dtype)
    y = F.int8_mm_dequant(product, rows, cols, out=out, bias=bias)
    assert y.dtype == (dtype or torch.float16)
    assert out is None or y is out
    exact = product.double() * rows.double().view(2, 4, 1) * cols.double() / 127**2
    exact = exact if bias is None else exact + bias.double()
    eps = torch.finfo(y.dtype).eps
    assert ((y.double() - exact).abs() <= eps / 2 * exact.abs() * 1.01 + 1e-6 * (1 + exact.abs())).all()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,)])
def test_nothing_to_quantize(shape):
    codes, absmax, outliers = F.int8_vectorwise_quant(torch.empty(shape), threshold=1.0)
    assert codes.shape == shape
    assert outliers.shape == (0,)
    assert torch.equal(absmax, torch.zeros(torch.Size(shape[:-1]).numel()))
    assert F.int8_vectorwise_dequant(codes, absmax).shape == shape
    assert F.int8_linear_matmul(codes, torch.ones(3, shape[-1], dtype=torch.int8)).shape == (*shape[:-1], 3)


def test_not_finite_values_get_code_0():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]])
    codes, absmax, _ = F.int8_vectorwise_quant(x)
    assert codes.tolist() == [[0, 0], [0, 0]]
    assert absmax[0].isnan()
    assert absmax[1].isinf()
    assert F.int8_vectorwise_quant(x, threshold=6.0)[2].tolist() == [0]


x = torch.randn(4, 6)
codes = torch.zeros(4, 6, dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.int8_vectorwise_quant(x.double()), "x is torch.float64"),
        (lambda: F.int8_vectorwise_quant(x, threshold=-1.0), "threshold is -1.0"),
        (lambda: F.int8_vectorwise_quant(x, threshold=float("nan")), "threshold is nan"),
        (lambda: F.int8_vectorwise_quant(torch.tensor(1.0)), "A has no dimensions"),
        (lambda: F.int8_vectorwise_dequant(x, torch.ones(4)), "codes is torch.float32; it must be torch.int8"),
        (lambda: F.int8_vectorwise_dequant(codes, torch.ones(6)), "absmax has 6 elements"),
        (lambda: F.int8_vectorwise_dequant(codes, torch.ones(4).half()), "absmax is torch.float16"),
        (lambda: F.int8_double_quant(x, out_row=codes.t()), r"out_row is torch.int8 \[6, 4\]"),
        (lambda: F.int8_double_quant(x, col_stats=torch.ones(4)), r"col_stats is torch.float32 \[4\].*\[6\]"),
        (lambda: F.int8_linear_matmul(codes, codes.t()), r"a has shape \[4, 6\] and b \[6, 4\]"),
        (lambda: F.int8_linear_matmul(codes, x), "b is torch.float32"),
        (lambda: F.int8_linear_matmul(codes, codes, dtype=torch.float32), "dtype is torch.float32"),
        (lambda: F.int8_linear_matmul(codes, codes, out=torch.zeros(4, 4)), "out is torch.float32"),
        (lambda: F.int8_linear_matmul(codes, codes.to("meta")), "different devices"),
        (lambda: F.int8_mm_dequant(codes, torch.ones(4), torch.ones(6)), "product is torch.int8; it must be torch.int32"),
        (lambda: F.int8_mm_dequant(codes.int(), torch.ones(6), torch.ones(4)), "row_absmax has 6 elements"),
        (lambda: F.int8_mm_dequant(codes.int(), torch.ones(4), torch.ones(6), bias=torch.ones(4)), r"bias has shape \[4\]"),
        (lambda: F.int8_mm_dequant(codes.int(), torch.ones(4), torch.ones(6), out=codes.double()), "dtype is torch.float64"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
