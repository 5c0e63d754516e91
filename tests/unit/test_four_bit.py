"""4-bit quantization as users call it."""

import pytest
import torch

from bnb_core import functional as F
from bnb_core.errors import InvalidArgumentError
from bnb_core.quantization import layout

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4", "af4", "int4"])
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


@dtypes
@quant_types
@nested_or_not
@pytest.mark.parametrize("blocksize", [None, 32, 4096])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (5, 13), (2, 3, 50)], ids=str)
def test_error_is_at_most_half_a_step(dtype, quant_type, nested, blocksize, shape):
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    packed, state = F.quantize_4bit(x, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
    n, blocksize = x.numel(), blocksize or 64
    assert torch.equal(x, before)
    assert packed.shape == ((n + 1) // 2, 1)
    assert packed.dtype == torch.uint8
    assert state.absmax.shape == (-(-n // blocksize),)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (x.shape, dtype, blocksize, quant_type)
    y = F.dequantize_4bit(packed, state)
    assert y.dtype == dtype
    assert y.shape == x.shape
    scales = state.absmax
    if nested:
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    scales = scales.double().repeat_interleave(blocksize)[:n].view(shape)
    half_step = state.code.double().sort().values.diff().max() / 2
    # Nested scales are off by 1 % of the largest of their block; the output dtype by half a unit in the last place.
    slack = 2**-8 * x.double().abs() + (0.01 * scales.max() if nested else 0.0)
    assert ((y.double() - x.double()).abs() <= half_step * scales * 1.000001 + slack).all()


def test_defaults_are_those_of_bitsandbytes():
    x = torch.randn(10, 64)
    packed, state = F.quantize_4bit(x)
    assert (state.quant_type, state.blocksize, state.nested, packed.dtype) == ("fp4", 64, False, torch.uint8)
    for quantize, dequantize, quant_type in (
        (F.quantize_nf4, F.dequantize_nf4, "nf4"),
        (F.quantize_fp4, F.dequantize_fp4, "fp4"),
    ):
        packed, state = quantize(x, compress_statistics=True)
        expected, expected_state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
        assert torch.equal(packed, expected)
        assert state == expected_state
        assert torch.equal(dequantize(packed, state), F.dequantize_4bit(expected, expected_state))


def test_the_first_element_is_in_the_high_nibble():
    packed, state = F.quantize_nf4(torch.tensor([1.0, -1.0, 0.0]))
    assert packed.tolist() == [[0xF0], [0x77]], "the nibble that is left over holds the code of 0"
    assert F.dequantize_4bit(packed, state).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("dtype", layout.STORAGE_DTYPES, ids=str)
@nested_or_not
def test_storage_dtype_only_reinterprets_the_bytes(dtype, nested):
    x = torch.randn(32, 33)
    expected, _ = F.quantize_4bit(x, compress_statistics=nested)
    stored, state = F.quantize_4bit(x, compress_statistics=nested, quant_storage=dtype)
    assert stored.dtype == dtype
    assert stored.shape == (528 // stored.element_size(), 1)
    assert torch.equal(layout.as_bytes(stored), expected.view(-1))
    y = F.dequantize_4bit(expected, state)
    assert torch.equal(F.dequantize_4bit(stored, state), y)
    assert torch.equal(F.dequantize_4bit(stored.t(), state), y.t())
    out = torch.zeros_like(stored)
    assert F.quantize_4bit(x, quant_storage=dtype, out=out)[0] is out
    assert torch.equal(layout.as_bytes(out), expected.view(-1))


@nested_or_not
def test_given_outputs_are_filled(nested):
    x = torch.randn(9, 15)
    packed, state = F.quantize_nf4(x, compress_statistics=nested)
    out = torch.full((68, 2), 9, dtype=torch.uint8)[:, :1]
    absmax = torch.zeros(3, dtype=torch.uint8 if nested else torch.float32)
    result, filled = F.quantize_nf4(x, absmax=absmax, out=out, compress_statistics=nested)
    assert result is out
    assert torch.equal(out, packed)
    assert filled.absmax is absmax
    assert torch.equal(absmax, state.absmax)
    y = torch.full((15, 9), float("nan")).t()
    assert F.dequantize_nf4(packed, state, out=y) is y
    assert torch.equal(y, F.dequantize_nf4(packed, state))


@dtypes
def test_without_a_state_the_output_says_what_to_make(dtype):
    x = torch.randn(7, 19).to(dtype)
    packed, state = F.quantize_nf4(x, blocksize=128)
    out = torch.empty(7, 19, dtype=dtype)
    assert F.dequantize_nf4(packed, absmax=state.absmax, out=out, blocksize=128) is out
    assert torch.equal(out, F.dequantize_4bit(packed, state))
    packed, state = F.quantize_fp4(x)
    F.dequantize_4bit(packed, absmax=state.absmax, out=out)
    assert torch.equal(out, F.dequantize_4bit(packed, state)), "the defaults are fp4 and 64"


def test_a_row_of_codes_gives_the_transposed_result():
    packed, state = F.quantize_nf4(torch.randn(6, 8))
    y = F.dequantize_4bit(packed, state)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), y.t())
    packed, state = F.quantize_nf4(torch.randn(2, 3, 8))
    assert torch.equal(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state)), "of matrices only"


def test_a_single_byte_is_no_row():
    packed, state = F.quantize_nf4(torch.randn(1, 2))
    assert packed.shape == (1, 1)
    assert F.dequantize_4bit(packed, state).shape == (1, 2)
    stored, state = F.quantize_nf4(torch.randn(2, 4), quant_storage=torch.float32)
    assert stored.shape == (1, 1)
    assert F.dequantize_4bit(stored, state).shape == (2, 4)


@nested_or_not
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_nothing_to_quantize(shape, nested):
    packed, state = F.quantize_4bit(torch.empty(shape), compress_statistics=nested)
    assert packed.shape == (0, 1)
    assert state.absmax.numel() == 0
    assert not nested or state.offset == 0
    assert F.dequantize_4bit(packed, state).shape == shape


def test_strided_input_is_taken_in_row_major_order():
    x = torch.randn(40, 30)
    packed, state = F.quantize_nf4(x.t())
    expected, expected_state = F.quantize_nf4(x.t().contiguous())
    assert torch.equal(packed, expected)
    assert state == expected_state
    strided = torch.stack([packed, packed], 1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(F.dequantize_4bit(strided, state), F.dequantize_4bit(packed, state))


def test_parameters_are_quantized_without_a_graph():
    parameter = torch.nn.Parameter(torch.randn(64, 3))
    packed, state = F.quantize_4bit(parameter, compress_statistics=True)
    assert not any(t.requires_grad for t in (packed, state.absmax, state.offset, state.state2.absmax, state.code))
    assert not F.dequantize_4bit(packed, state).requires_grad


@quant_types
def test_zeros_stay_zeros(quant_type):
    packed, state = F.quantize_4bit(torch.zeros(100), quant_type=quant_type)
    assert torch.equal(state.absmax, torch.zeros(2))
    assert torch.equal(F.dequantize_4bit(packed, state), torch.zeros(100))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_values_stay_in_their_block(value):
    x = torch.randn(192)
    x[70] = value
    packed, state = F.quantize_nf4(x)
    y = F.dequantize_4bit(packed, state)
    clean = F.dequantize_4bit(*F.quantize_nf4(torch.cat([x[:64], torch.zeros(64), x[128:]])))
    assert torch.equal(y[:64], clean[:64])
    assert torch.equal(y[128:], clean[128:])
    assert (packed.view(3, 32)[1] == 0x77).all()
    assert y[64:128].isnan().all(), "0 times a scale that is inf or NaN"


x = torch.randn(10, 7)
packed = torch.zeros(35, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: F.quantize_4bit(x.double()), "x is torch.float64; cast it"),
        (lambda s: F.quantize_4bit(x.int()), "x is torch.int32; cast it"),
        (lambda s: F.quantize_4bit(x, blocksize=48), "blocksize is 48; it must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        (lambda s: F.quantize_4bit(x, blocksize=0), "blocksize is 0"),
        (lambda s: F.quantize_4bit(x, quant_storage=torch.bool), "quant_storage is torch.bool; it must be one of torch.uint8"),
        (lambda s: F.quantize_4bit(x, quant_storage=torch.complex64), "quant_storage is torch.complex64"),
        (lambda s: F.quantize_4bit(x, quant_storage=torch.float16), "packed in 35 bytes.*2 bytes each.*use torch.uint8"),
        (lambda s: F.quantize_4bit(x, out=packed[:-1]), r"out is torch.uint8 \[34, 1\].*\[35, 1\]"),
        (lambda s: F.quantize_4bit(x, out=packed.int()), "out is torch.int32"),
        (lambda s: F.quantize_4bit(x, out=packed.to("meta")), "on meta.*on cpu"),
        (lambda s: F.quantize_4bit(x, absmax=torch.empty(3)), r"absmax is torch.float32 \[3\].*\[2\]"),
        (lambda s: F.quantize_4bit(x, absmax=torch.empty(2), compress_statistics=True), "torch.uint8"),
        (lambda s: F.dequantize_4bit(packed), "without quant_state, both absmax and out are needed"),
        (lambda s: F.dequantize_4bit(packed, absmax=s.absmax), "both absmax and out"),
        (lambda s: F.dequantize_4bit(packed, s, absmax=s.absmax), "quant_state has the absmax already"),
        (lambda s: F.dequantize_4bit(packed, s, blocksize=128), "blocksize is 128, that of quant_state is 64"),
        (lambda s: F.dequantize_4bit(packed, s, quant_type="int4"), "quant_type is 'int4', that of quant_state is 'nf4'"),
        (lambda s: F.dequantize_fp4(packed, s), "quant_state is of type 'nf4'"),
        (lambda s: F.dequantize_4bit(packed[:-1], s), "packed has 34 elements.* 35"),
        (lambda s: F.dequantize_4bit(packed, s, out=torch.empty(7, 10)), r"out for x is torch.float32 \[7, 10\]"),
        (lambda s: F.dequantize_4bit(packed, s, out=torch.empty(10, 7).half()), "out for x is torch.float16"),
        (lambda s: F.dequantize_4bit(packed.to("meta"), s), "different devices"),
        (lambda s: F.dequantize_4bit(packed, s.to("meta")), "different devices"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    _, state = F.quantize_nf4(x)
    with pytest.raises(InvalidArgumentError, match=message):
        call(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": torch.Size([7, 9])}, "packed has 35 elements.* 32"),
        ({"absmax": torch.ones(3)}, "absmax has 3 elements"),
        ({"absmax": torch.ones(2).half()}, "absmax is torch.float16"),
        ({"absmax": torch.ones(2, dtype=torch.uint8)}, "pass `nested` too"),
        ({"code": torch.ones(256)}, r"codebook has shape \[256\]; it must be \[16\]"),
        ({"blocksize": 96}, "blocksize is 96"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
    ],
)
def test_a_state_of_another_tensor_is_refused(changes, message):
    packed, state = F.quantize_nf4(x)
    vars(state).update(changes)
    with pytest.raises(InvalidArgumentError, match=message):
        F.dequantize_4bit(packed, state)
