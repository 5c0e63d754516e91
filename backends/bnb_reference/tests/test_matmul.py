"""Products with 4-bit weights: each element close to the float64 product, by a bound that holds for adversarial inputs."""

import pytest
import torch
from bnb_reference import devices
from bnb_reference.matmul import BFLOAT16_ROWS

from bnb_core import ops
from bnb_core.ops import Nested

#: Unit roundoff of each dtype.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check(y, x, w, bias=None, operand=2.0**-24):
    """Compare y with x w^T + bias in float64: |error| <= u |y| + (operand + 2^-24 K) sum |x||w|.

    `operand` is what rounding the factors may take. Every backend must reach the default in float32; this one multiplies in float32
    whatever the dtype, unless there are many rows of bfloat16, and rounds at the end.
    """
    x, w = x.double(), w.double()
    exact = x @ w.t() if bias is None else x @ w.t() + bias.double()
    u = ROUNDOFF[y.dtype]
    tiny = torch.finfo(y.dtype).tiny * u  # rounding to subnormal numbers
    bound = u * exact.abs() + tiny + (operand + 2.0**-24 * x.shape[-1]) * (x.abs() @ w.abs().t())
    error = (y.double() - exact).abs()
    assert y.shape == exact.shape
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


class Weight:
    """A random 4-bit weight [N, K], as arguments of the ops and as float32."""

    def __init__(self, N, K, codebook, blocksize=64, nested=False, values=None):
        packed, absmax = ops.quantize_4bit(torch.randn(N, K) if values is None else values, codebook, blocksize)
        statistics = None
        if nested:
            absmax = torch.randint(0, 256, absmax.shape, dtype=torch.uint8)
            statistics = Nested(torch.rand(-(-absmax.numel() // 3)), torch.linspace(-1, 1, 256), torch.tensor(1.3), 3)
        self.storage = (packed, absmax, codebook, blocksize)
        self.shape, self.nested = (N, K), statistics
        self.values = ops.dequantize_4bit(*self.storage, (N, K), torch.float32, statistics)

    def gemm(self, x, bias=None):
        return ops.gemm_4bit(x, *self.storage, *self.shape, bias, self.nested)

    def gemm_transposed(self, g):
        return ops.gemm_4bit_transposed(g, *self.storage, *self.shape, self.nested)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "blocksize"), [(1, 1, 32), (5, 7, 32), (37, 65, 64), (16, 256, 128), (3, 1003, 64), (40, 3, 4096)]
)
def test_gemm(N, K, blocksize, nested, nf4, dtype, pieces):
    weight = Weight(N, K, nf4, blocksize, nested)
    bias = torch.randn(N).to(dtype)
    for shape in ((K,), (1, K), (3, 5, K), (BFLOAT16_ROWS - 1, K)):
        x = torch.randn(shape).to(dtype)
        check(weight.gemm(x, bias), x, weight.values, bias)
        check(weight.gemm(x), x, weight.values)
        g = torch.randn(*shape[:-1], N).to(dtype)
        check(weight.gemm_transposed(g), g, weight.values.t())


def test_more_rows_than_a_panel(nf4, dtype):
    weight = Weight(1500, 801, nf4)
    assert 1500 * 801 > 1 << 19
    x, g = torch.randn(4, 801).to(dtype), torch.randn(4, 1500).to(dtype)
    check(weight.gemm(x), x, weight.values)
    check(weight.gemm_transposed(g), g, weight.values.t())


@pytest.mark.parametrize("bias", [0.0, 1000.0, -60000.0])
def test_sums_that_cancel(bias, nf4, dtype, pieces):
    weight = Weight(24, 512, nf4)
    x = torch.randn(9, 512)
    x[:, 256:] = -x[:, :256] * weight.values[0, :256] / weight.values[0, 256:].where(weight.values[0, 256:] != 0, torch.ones(()))
    x = x.to(dtype)
    biases = torch.full((24,), bias).to(dtype)
    check(weight.gemm(x, biases), x, weight.values, biases)


def test_magnitudes_far_apart(nf4, dtype):
    scale = 10 ** (torch.rand(64, 1) * 6 - 4)
    weight = Weight(64, 384, nf4, values=torch.randn(64, 384) * scale)
    x = (torch.randn(7, 384) * 10 ** (torch.rand(384) * 4 - 4)).to(dtype)
    check(weight.gemm(x), x, weight.values)


def test_large_bias_over_small_products(nf4, dtype):
    # Starting the sum with the bias would round at every step by what the whole sum is worth.
    weight = Weight(8, 4096, nf4, values=torch.rand(8, 4096))
    x = (torch.rand(3, 4096) * 1e-3).to(dtype)
    bias = torch.full((8,), 3e4).to(dtype)
    check(weight.gemm(x, bias), x, weight.values, bias)


@pytest.fixture(params=["this processor", "bfloat16 instructions"])
def bfloat16_instructions(request, monkeypatch):
    """Multiply many rows of bfloat16 as this processor would, and as one that has instructions for it."""
    if request.param == "bfloat16 instructions":
        monkeypatch.setattr(devices, "multiplies_bfloat16", lambda device: True)


@pytest.mark.parametrize("nested", [False, True])
def test_many_rows_of_bfloat16(nested, nf4, bfloat16_instructions):
    weight = Weight(700, 901, nf4, nested=nested)
    x, g = torch.randn(BFLOAT16_ROWS, 901).bfloat16(), torch.randn(BFLOAT16_ROWS, 700).bfloat16()
    bias = torch.randn(700).bfloat16()
    check(weight.gemm(x, bias), x, weight.values, bias, operand=2.0**-8)
    check(weight.gemm_transposed(g), g, weight.values.t(), operand=2.0**-8)


@pytest.mark.parametrize(("x_scale", "w_scale"), [(2.0**-127, 1.0), (1.0, 2.0**-127), (2.0**-100, 2.0**-30), (2.0**-10, 2.0**126)])
def test_many_rows_of_tiny_and_huge_bfloat16(x_scale, w_scale, nf4, bfloat16_instructions):
    # Instructions for bfloat16 take subnormal numbers for zero, and rounding the weight to it may overflow.
    weight = Weight(16, 64, nf4, values=torch.randn(16, 64).clamp(-1.99, 1.99) * w_scale)
    x, g = ((torch.randn(BFLOAT16_ROWS, n) * x_scale).bfloat16() for n in (64, 16))
    check(weight.gemm(x), x, weight.values)
    check(weight.gemm_transposed(g), g, weight.values.t())


def test_rounds_once(nf4):
    # The exact sum lies just above a tie of bfloat16; rounding the product before adding the bias would lose that.
    values = torch.zeros(1, 64)
    values[0, :2] = 1.0
    weight = Weight(1, 64, nf4, values=values)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 2.0**-8, 2.0**-20
    y = weight.gemm(x, torch.ones(1, dtype=torch.bfloat16))
    assert y.item() == 1 + 2.0**-7


def grouped(experts, N, K, codebook, nested, blocksize=64):
    """Return storage of all experts, nested statistics, and the float32 weights."""
    packed, absmax = zip(*(ops.quantize_4bit(torch.randn(N, K), codebook, blocksize) for _ in range(experts)))
    packed, absmax = torch.stack(packed), torch.stack(absmax)
    statistics = None
    scales = absmax
    if nested:
        # Groups of 5 scales, so that some span two experts.
        absmax = torch.randint(0, 256, absmax.shape, dtype=torch.uint8)
        statistics = Nested(torch.rand(-(-absmax.numel() // 5)), torch.linspace(-1, 1, 256), torch.tensor(1.3), 5)
        group = torch.div(torch.arange(absmax.numel()), 5, rounding_mode="floor")
        product = statistics.codebook[absmax.view(-1).long()] * statistics.absmax[group]
        scales = (product + statistics.offset).view(absmax.shape)
    weights = [ops.dequantize_4bit(p, a, codebook, blocksize, (N, K), torch.float32) for p, a in zip(packed, scales)]
    return packed, absmax, statistics, weights


def check_grouped(codebook, dtype, nested):
    N, K = 13, 37
    bounds = [0, 3, 3, 10, 10, 11, 11]
    packed, absmax, statistics, weights = grouped(len(bounds) - 1, N, K, codebook, nested)
    offsets = torch.tensor(bounds, dtype=torch.int32)
    x, g = torch.randn(11, K).to(dtype), torch.randn(11, N).to(dtype)
    y = ops.grouped_gemm_4bit(x, packed, absmax, codebook, 64, offsets, N, K, statistics)
    grad = ops.grouped_gemm_4bit_transposed(g, packed, absmax, codebook, 64, offsets, N, K, statistics)
    for start, stop, weight in zip(bounds, bounds[1:], weights):
        check(y[start:stop], x[start:stop], weight)
        check(grad[start:stop], g[start:stop], weight.t())


@pytest.mark.parametrize("nested", [False, True])
def test_grouped(nested, nf4, dtype, pieces):
    check_grouped(nf4, dtype, nested)


@pytest.mark.parametrize("nested", [False, True])
def test_grouped_without_reading_the_offsets(nested, nf4, dtype, host_reads_forbidden):
    check_grouped(nf4, dtype, nested)


def test_grouped_tokens_do_not_touch_each_other(nf4, host_reads_forbidden):
    packed, absmax, _, weights = grouped(2, 4, 8, nf4, False)
    x = torch.randn(6, 8)
    x[1] = float("nan")
    x[4] = float("inf")
    y = ops.grouped_gemm_4bit(x, packed, absmax, nf4, 64, torch.tensor([0, 3, 6], dtype=torch.int32), 4, 8)
    check(y[[0, 2]], x[[0, 2]], weights[0])
    check(y[[3, 5]], x[[3, 5]], weights[1])


def test_products_are_the_same_every_time(nf4):
    weight = Weight(700, 900, nf4)
    x, g = torch.randn(5, 900), torch.randn(5, 700)
    assert torch.equal(weight.gemm(x), weight.gemm(x))
    assert torch.equal(weight.gemm_transposed(g), weight.gemm_transposed(g))


def test_autocast_does_not_lower_the_precision(nf4):
    weight = Weight(64, 256, nf4)
    x, g = torch.randn(8, 256), torch.randn(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, grad = weight.gemm(x), weight.gemm_transposed(g)
    check(y, x, weight.values)
    check(grad, g, weight.values.t())
