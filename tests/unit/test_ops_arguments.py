"""Arguments of the ops: what fits works, what does not is one error that says what was given, what is accepted and what to do."""

import re

import pytest
import torch

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import BLOCKSIZES_4BIT, OPS, Nested

FUNCTIONAL = [op for op, spec in OPS.items() if spec.outputs]


def replaced(op, args, name, value):
    """Return the arguments with another value for one of them, or for a field of `nested`: `nested.absmax`."""
    names = [parameter.name for parameter in OPS[op].parameters]
    name, _, field = name.partition(".")
    args = list(args)
    at = names.index(name)
    value = value(args[at] if not field else getattr(args[at], field)) if callable(value) else value
    args[at] = args[at]._replace(**{field: value}) if field else value
    return args


def error_of(op, args):
    with pytest.raises(InvalidArgumentError) as caught:
        getattr(ops, op)(*args)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------- a table of what is refused

#: op, argument, its value (or a function of the right one), and what the message must say.
REFUSED = [
    ("quantize_blockwise", "x", lambda x: x.double(), "x is torch.float64; cast it to torch.float32, torch.float16 or"),
    ("quantize_blockwise", "x", lambda x: x.long(), "x is torch.int64; cast it"),
    ("quantize_blockwise", "x", lambda x: x.tolist(), "x is of type list; pass a torch.Tensor"),
    ("quantize_blockwise", "x", lambda x: x.numpy(), "x is of type ndarray; pass a torch.Tensor"),
    ("quantize_blockwise", "x", None, "x is None; pass a torch.Tensor"),
    ("quantize_blockwise", "codebook", lambda c: c[:255], "codebook has shape [255]; it must be [256]"),
    ("quantize_blockwise", "codebook", lambda c: c.half(), "codebook is torch.float16; it must be torch.float32"),
    ("quantize_blockwise", "blocksize", 0, "blocksize is 0; it must be at least 1"),
    ("quantize_blockwise", "blocksize", -64, "blocksize is -64; it must be at least 1"),
    ("quantize_blockwise", "blocksize", 64.0, "blocksize is 64.0, of type float; pass an int"),
    ("quantize_blockwise", "blocksize", True, "blocksize is True, of type bool; pass an int"),
    ("quantize_blockwise", "blocksize", None, "blocksize is None; pass an int"),
    ("quantize_blockwise", "blocksize", torch.tensor(64), "blocksize is of type Tensor; pass an int"),
    ("quantize_blockwise", "blocksize", "64", "blocksize is '64', of type str; pass an int"),
    ("dequantize_blockwise", "codes", lambda c: c.char(), "codes is torch.int8; it must be torch.uint8"),
    ("dequantize_blockwise", "absmax", lambda a: a[1:], "absmax has 6 elements; it must have 7, one for each block"),
    ("dequantize_blockwise", "absmax", lambda a: a.double(), "absmax is torch.float64; it must be torch.float32"),
    ("dequantize_blockwise", "dtype", torch.float64, "dtype is torch.float64; it must be torch.float32, torch.float16 or"),
    ("dequantize_blockwise", "dtype", "float32", "dtype is 'float32', of type str; pass a torch.dtype, such as torch.float32"),
    ("dequantize_blockwise", "dtype", None, "dtype is None; pass a torch.dtype"),
    ("quantize_4bit", "x", lambda x: x.to(torch.complex64), "x is torch.complex64; cast it"),
    ("quantize_4bit", "codebook", lambda c: c[:15], "codebook has shape [15]; it must be [16]"),
    ("quantize_4bit", "blocksize", 48, "blocksize is 48; it must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
    ("quantize_4bit", "blocksize", 16, "blocksize is 16; it must be one of"),
    ("quantize_4bit", "blocksize", 8192, "blocksize is 8192; it must be one of"),
    ("dequantize_4bit", "packed", lambda p: p[1:], "packed has 104 elements; it must have 105, one byte for two elements"),
    ("dequantize_4bit", "packed", lambda p: p.float(), "packed is torch.float32; it must be torch.uint8"),
    ("dequantize_4bit", "absmax", lambda a: a.byte(), "absmax is torch.uint8; without nested statistics it must be torch.float32;"),
    ("dequantize_4bit", "absmax", lambda a: a.half(), "absmax is torch.float16; without nested statistics it must be"),
    ("dequantize_4bit", "shape", (6, 36), "packed has 105 elements; it must have 108"),
    ("dequantize_4bit", "shape", (-6, -35), "shape[0] is -6; it must be 0 or more"),
    ("dequantize_4bit", "shape", (6.0, 35), "shape is 6.0, of type float; pass an int"),
    ("dequantize_4bit", "shape", 210, "shape is 210, of type int; pass a sequence of ints"),
    ("dequantize_4bit", "nested", (1, 2, 3), "nested is of type tuple; pass bnb_core.ops.Nested(absmax, codebook, offset,"),
    ("gemm_4bit", "x", lambda x: x[..., 1:], "x has shape [2, 4, 34]; its last dimension must be 35"),
    ("gemm_4bit", "x", torch.tensor(1.0), "x has shape []; its last dimension must be 35"),
    ("gemm_4bit", "x", lambda x: x.byte(), "x is torch.uint8; cast it"),
    ("gemm_4bit", "N", 7, "packed has 105 elements; it must have 123"),
    ("gemm_4bit", "N", -6, "N is -6; it must be 0 or more"),
    ("gemm_4bit", "K", 35.0, "K is 35.0, of type float; pass an int"),
    ("gemm_4bit", "bias", lambda b: b[1:], "bias has shape [5]; it must be [6]"),
    ("gemm_4bit", "bias", lambda b: b[None], "bias has shape [1, 6]; it must be [6]"),
    ("gemm_4bit", "bias", lambda b: b.half(), "bias is torch.float16; it must be torch.float32"),
    ("gemm_4bit", "bias", 1.0, "bias is 1.0, of type float; pass a torch.Tensor or None"),
    ("gemm_4bit_transposed", "g", lambda g: g[..., 1:], "g has shape [2, 4, 5]; its last dimension must be 6"),
    ("grouped_gemm_4bit", "x", lambda x: x[None], "x has shape [1, 4, 35]; it must have two dimensions"),
    ("grouped_gemm_4bit", "packed", lambda p: p.view(-1), "packed has shape [315]; it must have two dimensions"),
    ("grouped_gemm_4bit", "packed", lambda p: p[:, 1:], "packed has shape [3, 104]; it must be [3, 105]"),
    ("grouped_gemm_4bit", "absmax", lambda a: a.view(7, 3), "absmax has shape [7, 3]; it must be [3, 7]"),
    ("grouped_gemm_4bit", "offsets", lambda o: o.long(), "offsets is torch.int64; it must be torch.int32"),
    ("grouped_gemm_4bit", "offsets", lambda o: o[1:], "offsets has shape [3]; it must be [4]"),
    ("grouped_gemm_4bit", "offsets", lambda o: o + 1, "offsets[0] is 1; offsets must rise from 0 to 4, the number of tokens"),
    ("grouped_gemm_4bit", "offsets", lambda o: o[[0, 2, 1, 3]] + o.new_tensor([0, 1, 0, 0]), "offsets[2] is 1; offsets must rise"),
    ("grouped_gemm_4bit_transposed", "offsets", lambda o: o * 2, "offsets[3] is 8; offsets must rise from 0 to 4"),
    ("embedding_4bit", "indices", lambda i: i.float(), "indices are torch.float32; cast them to torch.int64 or torch.int32"),
    ("embedding_4bit", "indices", lambda i: i.byte(), "indices are torch.uint8; cast them"),
    ("embedding_4bit", "indices", lambda i: i * 0 + 6, "index 6 is out of range; indices must be in [0, 6)"),
    ("embedding_4bit", "indices", lambda i: -1 - i * 0, "index -1 is out of range; indices must be in [0, 6)"),
    ("embedding_4bit", "num_embeddings", -1, "num_embeddings is -1; it must be 0 or more"),
    ("embedding_8bit", "indices", lambda i: i * 0 + 6, "index 6 is out of range"),
    ("embedding_8bit", "codes", lambda c: c.byte(), "codes is torch.uint8; it must be torch.int8"),
    ("int8_quantize_rows", "x", lambda x: x[None], "x has shape [1, 4, 35]; it must have two dimensions; flatten the others first"),
    ("int8_quantize_rows", "threshold", -1.0, "threshold is -1.0; it must be 0.0 (no outliers) or positive"),
    ("int8_quantize_rows", "threshold", float("nan"), "threshold is nan; it must be 0.0"),
    ("int8_quantize_rows", "threshold", None, "threshold is None; pass a float"),
    ("int8_quantize_rows", "threshold", True, "threshold is True, of type bool; pass a float"),
    ("int8_quantize_rows_cols", "threshold", "6", "threshold is '6', of type str; pass a float"),
    ("int8_matmul", "b", lambda b: b[:, 1:], "a has shape [4, 35] and b [6, 34]; their last dimensions must be equal"),
    ("int8_matmul", "a", lambda a: a.int(), "a is torch.int32; it must be torch.int8"),
    ("int8_matmul", "a", lambda a: a[0], "a has shape [35]; it must have two dimensions"),
    ("int8_matmul_dequant", "product", lambda p: p.long(), "product is torch.int64; it must be torch.int32"),
    ("int8_matmul_dequant", "row_absmax", lambda a: a[1:], "row_absmax has 3 elements; it must have 4, one for each row or column"),
    ("int8_matmul_dequant", "col_absmax", lambda a: a[1:], "col_absmax has 5 elements; it must have 6"),
    ("int8_matmul_dequant", "bias", lambda b: b.half(), "bias is torch.float16; it must be torch.float32"),
    ("int8_dequantize_rows", "absmax", lambda a: a[1:], "absmax has 5 elements; it must have 6"),
    ("int8_linear", "codes", lambda c: c[0], "codes has shape [35]; it must have two dimensions"),
    ("int8_linear", "x", lambda x: x[..., :1], "x has shape [2, 4, 1]; its last dimension must be 35"),
    ("int8_linear", "absmax", lambda a: a.half(), "absmax is torch.float16; it must be torch.float32"),
    ("int8_linear_transposed", "g", lambda g: g[..., :1], "g has shape [2, 4, 1]; its last dimension must be 6"),
]
REFUSED_NESTED = [
    ("absmax", lambda a: a.float(), "absmax with nested statistics is torch.float32; it must be torch.uint8"),
    ("nested.absmax", lambda a: a.half(), "nested.absmax is torch.float16; it must be torch.float32"),
    ("nested.absmax", lambda a: a[1:], "nested.absmax has 1 elements; it must have 2, one for nested.blocksize scales"),
    ("nested.codebook", lambda c: c[:16], "nested.codebook has shape [16]; it must be [256]"),
    ("nested.offset", lambda o: o.double(), "nested.offset is torch.float64; it must be torch.float32"),
    ("nested.offset", lambda o: torch.zeros(2), "nested.offset has 2 elements; it must have 1"),
    ("nested.offset", 0.5, "nested.offset is 0.5, of type float; pass a torch.Tensor"),
    ("nested.blocksize", 0, "nested.blocksize is 0; it must be at least 1"),
    ("nested.blocksize", 4.0, "nested.blocksize is 4.0, of type float; pass an int"),
]


@pytest.mark.parametrize(
    ("op", "name", "value", "says"), REFUSED, ids=[f"{op}-{name}-{i}" for i, (op, name, *_) in enumerate(REFUSED)]
)
def test_refused(op, name, value, says, example_call):
    args = example_call(op)
    getattr(ops, op)(*args)
    for _ in range(2):  # also after the right call, and the same wrong call, have been seen
        message = error_of(op, replaced(op, args, name, value))
        assert says in message
        assert message.startswith(op)


@pytest.mark.parametrize(
    ("name", "value", "says"), REFUSED_NESTED, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(REFUSED_NESTED)]
)
@pytest.mark.parametrize("op", [op for op, spec in OPS.items() if spec.parameters[-1].kind == "nested"])
def test_refused_nested(op, name, value, says, example_call):
    args = example_call(op, nested=True)
    if op.startswith("grouped"):
        says = says.replace("has 1 elements; it must have 2", "has 5 elements; it must have 6")
    assert says in error_of(op, replaced(op, args, name, value))


@pytest.mark.skipif(not REGISTERED, reason="torch.compile of the ops needs torch 2.4")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize(("op", "name", "value", "says"), REFUSED[::4], ids=[f"{op}-{name}" for op, name, *_ in REFUSED[::4]])
def test_refused_alike_when_compiled(op, name, value, says, example_call):
    args = replaced(op, example_call(op), name, value)
    torch._dynamo.reset()
    with pytest.raises(InvalidArgumentError, match=re.escape(error_of(op, args)) + "$"):
        torch.compile(lambda: getattr(ops, op)(*args), backend="eager")()
    torch._dynamo.reset()


@pytest.mark.parametrize("op", [op for op in FUNCTIONAL if not op.startswith("int8_quantize")])
def test_devices_may_not_mix(op, example_call):
    args = example_call(op, nested=OPS[op].parameters[-1].kind == "nested")
    tensors = [parameter.name for parameter, value in zip(OPS[op].parameters, args) if isinstance(value, torch.Tensor)]
    for name in tensors + (["nested.offset"] if isinstance(args[-1], Nested) else []):
        message = error_of(op, replaced(op, args, name, lambda tensor: tensor.to("meta")))
        assert f"{name} on meta" in message
        assert message.endswith("move them to one")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: x.to_sparse(), "x has layout torch.sparse_coo; pass a dense tensor, as `x.to_dense()` is"),
        (lambda x: x.to_mkldnn(), "x has layout torch._mkldnn"),
        (lambda x: torch.nested.nested_tensor([x, x]) if hasattr(torch, "nested") else torch.empty(0).to_sparse(), "x "),
    ],
    ids=["sparse", "mkldnn", "nested"],
)
@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_other_layouts(make, says, example_call):
    x, *rest = example_call("quantize_4bit")
    ops.quantize_4bit(x, *rest)
    for _ in range(2):
        assert says in error_of("quantize_4bit", (make(x), *rest))


# ------------------------------------------------------------------------------------------------------------------- what is taken


def test_numbers_of_numpy_and_sequences_are_taken(example_call):
    numpy = pytest.importorskip("numpy")
    args = example_call("dequantize_4bit")
    expected = ops.dequantize_4bit(*args)
    packed, absmax, codebook, blocksize, shape, dtype, nested = args
    for sizes in (list(shape), tuple(shape), tuple(map(numpy.int64, shape))):
        assert torch.equal(ops.dequantize_4bit(packed, absmax, codebook, numpy.int32(blocksize), sizes, dtype, nested), expected)
    x, threshold = example_call("int8_quantize_rows", threshold=1.0)
    for given in (1, numpy.float32(1), numpy.int64(1)):
        for actual, wanted in zip(ops.int8_quantize_rows(x, given), ops.int8_quantize_rows(x, threshold)):
            assert torch.equal(actual, wanted)
    *rest, nested = example_call("gemm_4bit", nested=True)
    assert torch.equal(ops.gemm_4bit(*rest, tuple(nested)), ops.gemm_4bit(*rest, nested))


@pytest.mark.parametrize("blocksize", BLOCKSIZES_4BIT)
def test_every_blocksize(blocksize, example_call):
    x, codebook, _ = example_call("quantize_4bit", x=torch.randn(3, 1500))
    packed, absmax = ops.quantize_4bit(x, codebook, blocksize)
    back = ops.dequantize_4bit(packed, absmax, codebook, blocksize, x.shape, x.dtype)
    assert (back - x).abs().max() <= absmax.max() / 15 + 1e-6


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("op", FUNCTIONAL)
def test_strides_do_not_matter(op, nested, example_call):
    args = example_call(op, nested=nested and OPS[op].parameters[-1].kind == "nested")

    def strided(value):
        if isinstance(value, Nested):
            return Nested(*(strided(field) for field in value[:3]), value.blocksize)
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        apart = torch.stack([value, torch.zeros_like(value)], -1)[..., 0]
        return apart.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1) if value.dim() > 1 else apart

    expected, actual = getattr(ops, op)(*args), getattr(ops, op)(*map(strided, args))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_tensor_that_is_read_with_another_sign(example_call):
    """The imaginary part of a conjugate holds the opposite of what its memory does."""
    _, codebook, blocksize = example_call("quantize_4bit")
    x = torch.tensor([3.0 + 2.0j]).conj().imag
    assert x.is_neg()
    _, absmax = ops.quantize_4bit(x, codebook, blocksize)
    packed = ops.quantize_4bit(x, codebook, blocksize)[0]
    assert ops.dequantize_4bit(packed, absmax, codebook, blocksize, (1,), torch.float32).item() == -2


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2)])
def test_any_shape_is_quantized(shape, example_call):
    _, codebook4, _ = example_call("quantize_4bit")
    _, codebook8, _ = example_call("quantize_blockwise")
    x = torch.ones(shape)
    packed, absmax = ops.quantize_4bit(x, codebook4, 64)
    assert torch.equal(ops.dequantize_4bit(packed, absmax, codebook4, 64, shape, x.dtype), x)
    codes, absmax = ops.quantize_blockwise(x, codebook8, 64)
    assert torch.equal(ops.dequantize_blockwise(codes, absmax, codebook8, 64, x.dtype), x)


# ---------------------------------------------------------------------------------------------------------------- no elements

U8 = {"dtype": torch.uint8}
CODEBOOK4, CODEBOOK8 = torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256)
NO_WEIGHT = (torch.empty(0, **U8), torch.empty(0), CODEBOOK4, 64)
NO_NESTED = Nested(torch.empty(0), CODEBOOK8, torch.tensor(0.0), 256)
BIAS = torch.tensor([1.0, 2.0, 3.0])
NO_INT8 = torch.empty(0, 5, dtype=torch.int8)

#: op, arguments, and the outputs: a shape where there is no element, else the tensor.
EMPTY = [
    ("quantize_blockwise", (torch.empty(0, 3), CODEBOOK8, 7), [(0, 3), (0,)]),
    ("dequantize_blockwise", (torch.empty(3, 0, **U8), torch.empty(0), CODEBOOK8, 7, torch.float16), [(3, 0)]),
    ("quantize_4bit", (torch.empty(2, 0), CODEBOOK4, 64), [(0,), (0,)]),
    ("dequantize_4bit", (*NO_WEIGHT, (4, 0), torch.bfloat16, None), [(4, 0)]),
    ("dequantize_4bit", (torch.empty(0, **U8), torch.empty(0, **U8), CODEBOOK4, 64, (0,), torch.float32, NO_NESTED), [(0,)]),
    ("gemm_4bit", (torch.empty(2, 0), *NO_WEIGHT, 3, 0, BIAS, None), [BIAS.expand(2, 3)]),
    ("gemm_4bit", (torch.empty(2, 0), *NO_WEIGHT, 3, 0, None, None), [torch.zeros(2, 3)]),
    ("gemm_4bit", (torch.empty(2, 5), *NO_WEIGHT, 0, 5, torch.empty(0), None), [(2, 0)]),
    ("gemm_4bit", (torch.empty(0, 0), *NO_WEIGHT, 0, 0, None, None), [(0, 0)]),
    ("gemm_4bit_transposed", (torch.empty(2, 0), *NO_WEIGHT, 0, 5, None), [torch.zeros(2, 5)]),
    ("gemm_4bit_transposed", (torch.empty(2, 3), *NO_WEIGHT, 3, 0, None), [(2, 0)]),
    (
        "grouped_gemm_4bit",
        (
            torch.empty(0, 4),
            torch.empty(0, 6, **U8),
            torch.empty(0, 1),
            CODEBOOK4,
            64,
            torch.zeros(1, dtype=torch.int32),
            3,
            4,
            None,
        ),
        [(0, 3)],
    ),
    (
        "grouped_gemm_4bit",
        (
            torch.empty(2, 0),
            torch.empty(1, 0, **U8),
            torch.empty(1, 0),
            CODEBOOK4,
            64,
            torch.tensor([0, 2], dtype=torch.int32),
            3,
            0,
            None,
        ),
        [torch.zeros(2, 3)],
    ),
    ("embedding_4bit", (torch.empty(0, 2, dtype=torch.int64), *NO_WEIGHT, 0, 5, torch.float32, None), [(0, 2, 5)]),
    ("embedding_4bit", (torch.zeros(2, dtype=torch.int32), *NO_WEIGHT, 3, 0, torch.float32, None), [(2, 0)]),
    ("embedding_8bit", (torch.empty(0, dtype=torch.int64), NO_INT8, torch.empty(0), torch.float32), [(0, 5)]),
    ("int8_quantize_rows", (torch.empty(0, 3), 6.0), [(0, 3), (0,), torch.zeros(3, dtype=torch.bool)]),
    ("int8_quantize_rows", (torch.empty(2, 0), 0.0), [(2, 0), torch.zeros(2), (0,)]),
    ("int8_quantize_rows_cols", (torch.empty(0, 3), 6.0), [(0, 3), (0,), (0, 3), torch.zeros(3), torch.zeros(3, dtype=torch.bool)]),
    (
        "int8_matmul",
        (torch.empty(2, 0, dtype=torch.int8), torch.empty(3, 0, dtype=torch.int8)),
        [torch.zeros(2, 3, dtype=torch.int32)],
    ),
    ("int8_matmul", (NO_INT8, NO_INT8), [(0, 0)]),
    ("int8_matmul_dequant", (torch.empty(0, 3, dtype=torch.int32), torch.empty(0), BIAS, BIAS, torch.float32), [(0, 3)]),
    ("int8_dequantize_rows", (NO_INT8, torch.empty(0), torch.float32), [(0, 5)]),
    ("int8_linear", (torch.empty(2, 0), torch.empty(3, 0, dtype=torch.int8), BIAS, BIAS, 6.0), [BIAS.expand(2, 3)]),
    ("int8_linear", (torch.empty(0, 5), torch.zeros(3, 5, dtype=torch.int8), BIAS, BIAS, 0.0), [(0, 3)]),
    ("int8_linear", (torch.empty(4, 5), NO_INT8, torch.empty(0), None, 6.0), [(4, 0)]),
    ("int8_linear_transposed", (torch.empty(2, 0), NO_INT8, torch.empty(0)), [torch.zeros(2, 5)]),
]


@pytest.mark.parametrize(
    "directly", [True, pytest.param(False, marks=pytest.mark.skipif(not REGISTERED, reason="needs torch 2.4"))]
)
@pytest.mark.parametrize(("op", "args", "expected"), EMPTY, ids=[f"{op}-{i}" for i, (op, *_) in enumerate(EMPTY)])
def test_no_elements(op, args, expected, directly):
    if directly:
        results = getattr(ops, op)(*args)
    else:
        from bnb_core.ops.schema import flatten

        results = getattr(torch.ops.bnb, op)(*flatten(OPS[op], args))
    results = results if isinstance(results, (tuple, list)) else (results,)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected):
        if isinstance(wanted, tuple):
            assert result.shape == wanted
        else:
            assert torch.equal(result, wanted)


def test_no_experts_but_tokens():
    args = (torch.empty(2, 4), torch.empty(0, 6, **U8), torch.empty(0, 1), CODEBOOK4, 64, torch.zeros(1, dtype=torch.int32), 3, 4)
    assert "offsets[0] is 0; offsets must rise from 0 to 2" in error_of("grouped_gemm_4bit", args)


def test_an_empty_table_has_no_row():
    args = (torch.zeros(1, dtype=torch.int64), *NO_WEIGHT, 0, 5, torch.float32)
    assert "index 0 is out of range; indices must be in [0, 0)" in error_of("embedding_4bit", args)
