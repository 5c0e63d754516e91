"""`out=`: the caller's tensors are filled, whatever their strides and their memory, or refused."""

import pytest
import torch

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import OPS

#: The ops whose function takes `out`.
WITH_OUT = [
    "quantize_blockwise",
    "dequantize_blockwise",
    "quantize_4bit",
    "dequantize_4bit",
    "gemm_4bit",
    "gemm_4bit_transposed",
    "int8_quantize_rows",
    "int8_matmul",
    "int8_matmul_dequant",
    "int8_dequantize_rows",
    "int8_linear",
    "int8_linear_transposed",
]
SEVERAL = [op for op in WITH_OUT if len(OPS[op].outputs) > 1]


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def filled(op, args, make):
    """Run an op into tensors made from the expected ones, and return these and what it returned."""
    expected = getattr(ops, op)(*args)
    out = tuple(map(make, as_tuple(expected)))
    returned = getattr(ops, op)(*args, out=out if isinstance(expected, tuple) else out[0])
    assert all(a is b for a, b in zip(as_tuple(returned), out))
    return expected, returned


def with_gaps(tensor):
    return torch.full((*tensor.shape, 2), 77).to(tensor.dtype)[..., 0]


@pytest.mark.parametrize("make", [torch.empty_like, with_gaps], ids=["contiguous", "with gaps"])
@pytest.mark.parametrize("op", WITH_OUT)
def test_filled(op, make, example_call):
    expected, returned = filled(op, example_call(op), make)
    torch.testing.assert_close(returned, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", WITH_OUT)
def test_nothing_but_out_is_written(op, example_call):
    """What lies between the elements of `out` stays."""
    args = example_call(op)
    expected = getattr(ops, op)(*args)
    wholes = [torch.full((*tensor.shape, 2), 77).to(tensor.dtype) for tensor in as_tuple(expected)]
    out = tuple(whole[..., 0] for whole in wholes)
    getattr(ops, op)(*args, out=out if isinstance(expected, tuple) else out[0])
    assert all((whole[..., 1] == torch.tensor(77).to(whole.dtype)).all() for whole in wholes)


def test_a_list_is_as_good_as_a_tuple(example_call):
    args = example_call("quantize_4bit")
    expected = ops.quantize_4bit(*args)
    out = list(map(torch.empty_like, expected))
    assert ops.quantize_4bit(*args, out=out) is out
    torch.testing.assert_close(tuple(out), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "registered", [False, pytest.param(True, marks=pytest.mark.skipif(not REGISTERED, reason="needs torch 2.4"))]
)
@pytest.mark.parametrize("op", WITH_OUT)
def test_refused(op, registered, example_call):
    """The same holds where a subclass of Tensor brings the call to the torch dispatcher."""

    class Subclass(torch.Tensor):
        pass

    first, *rest = example_call(op)
    args = (first.as_subclass(Subclass) if registered else first, *rest)
    results = as_tuple(getattr(ops, op)(*args))
    spec = OPS[op]

    def refused(position, wrong, says):
        out = [torch.empty_like(result) for result in results]
        out[position] = wrong
        with pytest.raises(InvalidArgumentError) as caught:
            getattr(ops, op)(*args, out=tuple(out) if len(out) > 1 else out[0])
        assert says in str(caught.value)
        assert f"out for {spec.outputs[position][0]}" in str(caught.value)

    for position, result in enumerate(results):
        plain = torch.empty_like(result).as_subclass(torch.Tensor)
        refused(
            position, plain[None], f"is {result.dtype} {[1, *result.shape]} on cpu; it must be {result.dtype} {list(result.shape)}"
        )
        refused(position, plain.to(torch.float64), "is torch.float64")
        refused(position, plain.to("meta"), f"on meta; it must be {result.dtype} {list(result.shape)} on cpu")
        refused(position, plain.tolist(), f"is list; pass a {result.dtype} tensor of shape {list(result.shape)}")
        refused(position, plain[:1].expand(result.shape), "so that elements share memory")
        if result.is_floating_point():
            refused(position, plain.requires_grad_(), "requires grad, and no gradient passes through out")


@pytest.mark.parametrize("op", SEVERAL)
def test_one_tensor_for_each_output(op, example_call):
    args = example_call(op)
    results = getattr(ops, op)(*args)
    for wrong, says in ((results[0], "out is a Tensor"), (results[:1], "out is 1 of them"), ((*results, results[0]), "of them")):
        with pytest.raises(InvalidArgumentError) as caught:
            getattr(ops, op)(*args, out=wrong)
        assert says in str(caught.value)
        assert f"pass a tuple of {len(results)} tensors: {', '.join(name for name, _ in OPS[op].outputs)}" in str(caught.value)


def test_out_may_be_an_argument(example_call):
    """A product whose result has the shape of x may replace it."""
    x = torch.randn(5, 6)
    _, *weight = example_call("gemm_4bit_transposed")
    packed, absmax = ops.quantize_4bit(torch.randn(6, 6), weight[2], 32)
    args = (packed, absmax, weight[2], 32, 6, 6)
    expected = ops.gemm_4bit(x, *args)
    assert torch.equal(ops.gemm_4bit(x, *args, out=x), expected)
    assert torch.equal(x, expected)


def test_out_may_overlap_an_argument_in_part(example_call):
    _, *weight = example_call("gemm_4bit_transposed")
    packed, absmax = ops.quantize_4bit(torch.randn(6, 6), weight[2], 32)
    args = (packed, absmax, weight[2], 32, 6, 6)
    memory = torch.randn(8, 6)
    expected = ops.gemm_4bit(memory[:5], *args)
    assert torch.equal(ops.gemm_4bit(memory[:5], *args, out=memory[3:]), expected)


def test_outputs_may_overlap_each_other(example_call):
    """The one that is named last wins, as if they were copied in order."""
    x, codebook, _ = example_call("quantize_4bit", x=torch.randn(64))
    packed, absmax = ops.quantize_4bit(x, codebook, 32)
    memory = torch.zeros(32, dtype=torch.uint8)
    ops.quantize_4bit(x, codebook, 32, out=(memory, memory[:8].view(torch.float32)))
    assert torch.equal(memory[:8].view(torch.float32), absmax)
    assert torch.equal(memory[8:], packed[8:])


def test_memory_next_to_an_argument_is_no_overlap(example_call, register_recorder):
    """A kernel then writes to `out` itself."""
    from bnb_core.backends import use_backend

    x = torch.randn(10, 6)
    _, *weight = example_call("gemm_4bit_transposed")
    packed, absmax = ops.quantize_4bit(torch.randn(6, 6), weight[2], 32)
    args = (packed, absmax, weight[2], 32, 6, 6)
    recorder = register_recorder("recorder")
    with use_backend("recorder"):
        ops.gemm_4bit(x[:5], *args, out=x[5:])
        assert recorder.outs[-1].data_ptr() == x[5:].data_ptr()
        ops.gemm_4bit(x[:5], *args, out=x[4:9])
        assert recorder.outs[-1].data_ptr() != x[4:9].data_ptr()


@pytest.mark.parametrize("op", ["optimizer_step_32bit_", "optimizer_step_8bit_blockwise_"])
def test_ops_in_place_have_none(op, example_call):
    from bnb_core.ops.structured import structured_op

    args = example_call(op)
    with pytest.raises(InvalidArgumentError, match="updates its arguments in place"):
        structured_op(op)(*args, out=args[0])
