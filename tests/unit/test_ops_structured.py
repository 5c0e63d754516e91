"""How an op runs: what is checked once and what at each call, and what a kernel is given."""

import copy
import pickle

import pytest
import torch

from bnb_core import ops
from bnb_core.backends import Backend, register, use_backend
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops import structured
from bnb_core.ops.spec import OPS
from bnb_core.ops.structured import structured_op


@pytest.fixture
def checked(monkeypatch):
    """List the calls of `dequantize_4bit` that are checked in full."""
    op = structured_op("dequantize_4bit")
    calls, meta = [], op.meta
    monkeypatch.setattr(op, "meta", lambda *args: calls.append(args) or meta(*args))
    monkeypatch.setattr(op, "_forms", {})
    return calls


def test_calls_of_one_signature_are_checked_once(checked, example_call):
    packed, absmax, codebook, blocksize, shape, dtype, nested = example_call("dequantize_4bit")
    results = [ops.dequantize_4bit(packed, absmax, codebook, blocksize, shape, dtype, nested) for _ in range(3)]
    ops.dequantize_4bit(packed.clone(), absmax * 2, codebook.flip(0), blocksize, shape, dtype, nested)
    assert len(checked) == 1
    assert results[1] is not results[2]
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": torch.Size((35, 6))},
        {"dtype": torch.bfloat16},
        {"blocksize": 64},
        {"packed": torch.zeros(105, dtype=torch.int8)},
        {"absmax": torch.zeros(6)},
        {"absmax": torch.zeros(7, dtype=torch.uint8)},
        {"codebook": torch.zeros(15)},
        {"packed": torch.zeros(105, dtype=torch.uint8, device="meta")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_may_not_fit_is_checked_anew(change, checked, example_call):
    ops.dequantize_4bit(*example_call("dequantize_4bit"))
    try:
        result = ops.dequantize_4bit(*example_call("dequantize_4bit", **change))
    except InvalidArgumentError:
        assert "shape" not in change
        assert "dtype" not in change
    else:
        assert len(checked) == 2
        assert result.shape == change.get("shape", (6, 35))
        assert result.dtype == change.get("dtype", torch.float32)


def test_signatures_do_not_pile_up(monkeypatch, example_call):
    op = structured_op("quantize_blockwise")
    monkeypatch.setattr(structured, "_MOST_SIGNATURES", 4)
    monkeypatch.setattr(op, "_forms", {})
    _, codebook, blocksize = example_call("quantize_blockwise")
    for n in list(range(1, 12)) + list(range(1, 12)):
        codes, _ = ops.quantize_blockwise(torch.ones(n), codebook, blocksize)
        assert codes.tolist() == [255] * n
    (form,) = op._forms.values()
    assert len(form.signatures) <= 4


@pytest.fixture
def backend():
    backend = Backend("tested", api_version=(1, 0), priority=-1)
    register(backend)
    return backend


def run_on(backend, op, *args):
    with use_backend(backend.name):
        return getattr(ops, op)(*args)


def test_a_kernel_gets_what_the_spec_says(backend, example_call):
    given = {}

    @backend.kernel("dequantize_4bit", devices={"cpu"}, dtypes=[torch.bfloat16], scratch=lambda call: 3 * call.blocksize)
    def dequantize_4bit(packed, absmax, codebook, blocksize, nested, *, out, scratch):
        given.update(locals())
        out.fill_(1)

    packed, absmax, codebook, blocksize, shape, dtype, nested = example_call("dequantize_4bit", torch.bfloat16, nested=True)
    apart = torch.stack([packed, packed], 1)[:, 0]
    result = run_on(backend, "dequantize_4bit", apart, absmax, codebook, blocksize, shape, dtype, nested)
    assert given["out"] is result
    assert (given["packed"].is_contiguous(), given["blocksize"], given["nested"]) == (True, 32, nested)
    assert torch.equal(given["packed"], packed)
    assert (given["scratch"].dtype, given["scratch"].numel(), given["scratch"].device.type) == (torch.uint8, 96, "cpu")


def test_a_kernel_gets_a_tuple_of_outputs(backend, example_call):
    @backend.kernel("quantize_4bit", devices={"cpu"}, dtypes=[torch.float32])
    def quantize_4bit(x, codebook, blocksize, *, out):
        packed, absmax = out
        packed.fill_(7), absmax.fill_(8)

    packed, absmax = run_on(backend, "quantize_4bit", *example_call("quantize_4bit"))
    assert (packed == 7).all()
    assert (absmax == 8).all()


def test_a_kernel_runs_outside_autograd(backend, example_call):
    @backend.kernel("quantize_4bit", devices={"cpu"}, dtypes=[torch.float32])
    def quantize_4bit(x, codebook, blocksize, *, out):
        assert not torch.is_grad_enabled()
        torch.add(x.sum(), 0 * out[1], out=out[1])

    x, *rest = example_call("quantize_4bit")
    _, absmax = run_on(backend, "quantize_4bit", x.requires_grad_(), *rest)
    assert not absmax.requires_grad


def test_a_kernel_is_not_bothered_with_nothing(backend, example_call):
    @backend.kernel("gemm_4bit", devices={"cpu"}, dtypes=[torch.float32])
    def gemm_4bit(x, packed, absmax, codebook, blocksize, N, K, bias, nested, *, out):
        raise AssertionError("there is nothing to compute")

    x, *rest = example_call("gemm_4bit")
    assert run_on(backend, "gemm_4bit", x[:0], *rest).shape == (0, 4, 6)


def test_what_a_kernel_raises_comes_out_as_it_is(backend, example_call):
    @backend.kernel("gemm_4bit", devices={"cpu"}, dtypes=[torch.float32])
    def gemm_4bit(x, packed, absmax, codebook, blocksize, N, K, bias, nested, *, out):
        raise MemoryError("the device is full")

    with pytest.raises(MemoryError, match="the device is full") as caught:
        run_on(backend, "gemm_4bit", *example_call("gemm_4bit"))
    notes = getattr(caught.value, "__notes__", ["gemm_4bit failed in backend 'tested'"])
    assert "gemm_4bit failed in backend 'tested'" in notes[0]


@pytest.mark.parametrize("op", OPS)
def test_functions_may_be_copied_and_pickled(op):
    function = getattr(ops, op)
    assert copy.deepcopy(function) is function
    assert pickle.loads(pickle.dumps(function)) is function
    assert structured_op(op).spec is OPS[op]


def test_there_is_a_function_for_each_op_of_the_spec():
    assert set(OPS) == set(ops.__all__) - {"Hyperparameters", "Nested"}
    with pytest.raises(AttributeError, match="has no attribute 'gemm_5bit'"):
        ops.gemm_5bit  # noqa: B018
