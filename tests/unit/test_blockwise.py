"""8-bit blockwise quantization as users call it."""

import pytest
import torch

from bnb_core import functional as F
from bnb_core.errors import InvalidArgumentError

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (4095,), (3, 5, 7), (100, 41)], ids=str)
@pytest.mark.parametrize("blocksize", [1, 33, 256, 4096])
def test_error_is_at_most_half_a_step(dtype, shape, blocksize):
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    codes, state = F.quantize_blockwise(x, blocksize=blocksize)
    assert torch.equal(x, before)
    assert codes.shape == x.shape
    assert codes.dtype == torch.uint8
    assert state.absmax.shape == (-(-x.numel() // blocksize),)
    assert state.absmax.dtype == torch.float32
    assert state.shape is None
    assert state.quant_type is None
    assert state.dtype == dtype
    assert state.blocksize == blocksize
    y = F.dequantize_blockwise(codes, state)
    assert y.dtype == dtype
    assert y.shape == x.shape
    steps = state.code.double().diff().max() / 2 + 2**-8  # and half a unit in the last place of bfloat16
    scales = state.absmax.double().repeat_interleave(blocksize)[: x.numel()].view(shape)
    assert ((y.double() - x.double()).abs() <= steps * scales).all()


def test_defaults_are_those_of_bitsandbytes():
    codes, state = F.quantize_blockwise(torch.randn(5000))
    assert state.blocksize == 4096
    assert not state.nested
    assert torch.equal(state.code, F.create_dynamic_map())
    assert torch.equal(F.dequantize_blockwise(codes, absmax=state.absmax), F.dequantize_blockwise(codes, state))


@dtypes
def test_nested_scales(dtype):
    x = torch.randn(64, 100).to(dtype) * torch.logspace(-2, 0, 64)[:, None].to(dtype)
    plain_codes, plain = F.quantize_blockwise(x, blocksize=100)
    codes, state = F.quantize_blockwise(x, blocksize=100, nested=True)
    assert torch.equal(codes, plain_codes), "the codes do not depend on how the scales are kept"
    assert state.absmax.dtype == torch.uint8
    assert state.state2.blocksize == 100
    assert state.offset == plain.absmax.double().mean().float()
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert (scales - plain.absmax).abs().max() <= 0.01 * plain.absmax.max()
    expected = F.dequantize_blockwise(codes, absmax=scales, blocksize=100, out=torch.empty_like(x))
    assert torch.equal(F.dequantize_blockwise(codes, state, nested=True), expected)
    assert torch.equal(F.dequantize_blockwise(codes, state), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_given_outputs_are_filled(nested):
    x = torch.randn(7, 41)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=nested)
    out = torch.full((41, 7), 9, dtype=torch.uint8).t()
    absmax = torch.zeros(5, dtype=torch.uint8 if nested else torch.float32)
    result, filled = F.quantize_blockwise(x, absmax=absmax, out=out, blocksize=64, nested=nested)
    assert result is out
    assert torch.equal(out, codes)
    assert filled.absmax is absmax
    assert torch.equal(absmax, state.absmax)
    y = torch.full((41, 7), float("nan")).t()
    assert F.dequantize_blockwise(codes, state, out=y) is y
    assert torch.equal(y, F.dequantize_blockwise(codes, state))


def test_output_gives_the_dtype_where_there_is_no_state():
    codes, state = F.quantize_blockwise(torch.randn(100))
    half = torch.empty(100, dtype=torch.float16)
    F.dequantize_blockwise(codes, absmax=state.absmax, out=half)
    assert torch.equal(half, F.dequantize_blockwise(codes, state).half())


def test_custom_codebooks_may_come_in_any_order():
    code = torch.rand(256) * 2 - 1
    code[:2] = torch.tensor([-1.0, 1.0])
    x = torch.randn(1000)
    codes, state = F.quantize_blockwise(x, code=code, blocksize=100)
    assert torch.equal(state.code, code)
    assert state.code is not code
    scaled = x.view(10, 100) / state.absmax[:, None]
    nearest = (scaled.double()[..., None] - code.double()).abs().min(-1).values
    chosen = (scaled.double() - code.double()[codes.view(10, 100).long()]).abs()
    assert ((chosen - nearest) <= 1e-6).all()
    assert torch.equal(
        F.dequantize_blockwise(codes, absmax=state.absmax, code=code, blocksize=100), F.dequantize_blockwise(codes, state)
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_nothing_to_quantize(shape, nested):
    codes, state = F.quantize_blockwise(torch.empty(shape), nested=nested)
    assert codes.shape == shape
    assert state.absmax.numel() == 0
    assert F.dequantize_blockwise(codes, state).shape == shape


def test_strided_input_is_taken_in_row_major_order():
    x = torch.randn(40, 30)
    codes, state = F.quantize_blockwise(x.t(), blocksize=64)
    expected, expected_state = F.quantize_blockwise(x.t().contiguous(), blocksize=64)
    assert torch.equal(codes, expected)
    assert state == expected_state
    assert torch.equal(F.dequantize_blockwise(codes.t(), absmax=torch.ones(1)), state.code[codes.t().long()])


def test_parameters_are_quantized_without_a_graph():
    parameter = torch.nn.Parameter(torch.randn(100))
    codes, state = F.quantize_blockwise(parameter, nested=True)
    assert not any(t.requires_grad for t in (codes, state.absmax, state.offset, state.state2.absmax, state.code))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_values_stay_in_their_block(value):
    x = torch.randn(256)
    x[70] = value
    codes, state = F.quantize_blockwise(x, blocksize=64)
    clean, clean_state = F.quantize_blockwise(x.nan_to_num(0.0, 0.0, 0.0), blocksize=64)
    others = torch.tensor([0, 2, 3])
    assert torch.equal(codes.view(4, 64)[others], clean.view(4, 64)[others])
    assert torch.equal(state.absmax[others], clean_state.absmax[others])
    expected = torch.tensor(abs(value))
    assert torch.equal(state.absmax[1:2].isnan(), expected.isnan().view(1))
    assert value != value or state.absmax[1] == expected
    zero = F.quantize_blockwise(torch.zeros(1))[0]
    assert (codes[64:128] == zero).all(), "0 is what finite / inf and NaN quantize to"


x = torch.randn(10)
codes = torch.zeros(10, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: F.quantize_blockwise(x.double()), "x is torch.float64; cast it"),
        (lambda s: F.quantize_blockwise(x, blocksize=0), "blocksize is 0; it must be at least 1"),
        (lambda s: F.quantize_blockwise(x, code=torch.zeros(16)), r"codebook has shape \[16\]; it must be \[256\]"),
        (lambda s: F.quantize_blockwise(x, code=torch.zeros(256).half()), "codebook is torch.float16"),
        (lambda s: F.quantize_blockwise(x, out=torch.empty(9, dtype=torch.uint8)), r"out is torch.uint8 \[9\].*\[10\]"),
        (lambda s: F.quantize_blockwise(x, out=torch.empty(10)), "out is torch.float32"),
        (lambda s: F.quantize_blockwise(x, absmax=torch.empty(2)), r"absmax is torch.float32 \[2\].*\[1\]"),
        (lambda s: F.quantize_blockwise(x, absmax=torch.empty(1), nested=True), "absmax is torch.float32.*torch.uint8"),
        (lambda s: F.dequantize_blockwise(codes), "neither quant_state nor absmax is given"),
        (lambda s: F.dequantize_blockwise(codes, s, absmax=s.absmax), "pass it, or them"),
        (lambda s: F.dequantize_blockwise(codes, s, code=s.code), "pass it, or them"),
        (lambda s: F.dequantize_blockwise(codes, s, nested=True), "nested is True, but"),
        (lambda s: F.dequantize_blockwise(codes, s, blocksize=32), "blocksize is 32, that of quant_state is"),
        (lambda s: F.dequantize_blockwise(codes.int(), s), "codes is torch.int32; it must be torch.uint8"),
        (lambda s: F.dequantize_blockwise(codes[:0], s), "absmax has 1 elements"),
        (lambda s: F.dequantize_blockwise(codes, s, out=torch.empty(10).half()), "out for x is torch.float16"),
        (lambda s: F.dequantize_blockwise(codes, s.to("meta")), "different devices"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    _, state = F.quantize_blockwise(x)
    with pytest.raises(InvalidArgumentError, match=message):
        call(state)
