"""Quantization functions inside compiled and traced code: one graph, the same results, nothing kept from the trace."""

import pytest
import torch

import bnb_core as bnb
from bnb_core import functional as F
from bnb_core.ops.plain import REGISTERED

pytestmark = [
    pytest.mark.skipif(not REGISTERED, reason="this torch has no torch.ops.bnb to trace"),
    # torch's own tracer of autograd functions.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


@nested_or_not
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_matmul_4bit(nested, storage):
    packed, state = F.quantize_4bit(torch.randn(48, 64), compress_statistics=nested, quant_storage=storage)
    bias = torch.randn(48, requires_grad=True)
    run = compiled(lambda x: bnb.matmul_4bit(x, packed.t(), state, bias=bias))
    for rows in (5, 3):
        x = torch.randn(rows, 64, requires_grad=True)
        y = run(x)
        assert torch.equal(y, bnb.matmul_4bit(x, packed, state, bias=bias))
        grads = torch.autograd.grad(y.square().sum(), (x, bias))
        expected = torch.autograd.grad(bnb.matmul_4bit(x, packed, state, bias=bias).square().sum(), (x, bias))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected))


def test_matmul_4bit_with_dynamic_batches():
    packed, state = F.quantize_4bit(torch.randn(48, 64))
    run = compiled(lambda x: bnb.matmul_4bit(x, packed, state), dynamic=True)
    for rows in (5, 3, 17):
        x = torch.randn(rows, 64)
        assert torch.equal(run(x), bnb.matmul_4bit(x, packed, state))


def test_transposed_weights_compile_without_a_warning():
    packed, state = F.quantize_4bit(torch.randn(64, 48))
    x = torch.randn(5, 64)
    y = compiled(lambda x: bnb.matmul_4bit(x, packed, state))(x)  # a warning would be an error
    with pytest.warns(DeprecationWarning, match="Re-quantize"):
        assert torch.equal(y, bnb.matmul_4bit(x, packed, state))


@nested_or_not
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
def test_dequantize_4bit(nested, storage):
    packed, state = F.quantize_4bit(torch.randn(48, 64), compress_statistics=nested, quant_storage=storage)
    expected = F.dequantize_4bit(packed, state)
    assert torch.equal(compiled(lambda packed: F.dequantize_4bit(packed, state))(packed), expected)
    assert torch.equal(compiled(lambda packed: F.dequantize_4bit(packed.t(), state))(packed), expected.t())


@nested_or_not
def test_quantize_4bit(nested):
    def run(x):
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
        return packed, state.absmax, state.code, F.dequantize_4bit(packed, state)

    x = torch.randn(48, 33)
    assert all(torch.equal(a, b) for a, b in zip(compiled(run)(x), run(x)))


@nested_or_not
def test_blockwise(nested):
    def run(x):
        codes, state = F.quantize_blockwise(x, blocksize=100, nested=nested)
        return codes, state.absmax, F.dequantize_blockwise(codes, state)

    x = torch.randn(48, 33)
    assert all(torch.equal(a, b) for a, b in zip(compiled(run)(x), run(x)))


def test_given_outputs_are_filled():
    packed, state = F.quantize_4bit(torch.randn(48, 64))
    x, out = torch.randn(5, 64), torch.empty(5, 48)
    assert torch.equal(compiled(lambda x, out: bnb.matmul_4bit(x, packed, state, out=out))(x, out), out)
    assert torch.equal(out, bnb.matmul_4bit(x, packed, state))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_matmul_of_int8_weights(threshold):
    state = bnb.MatmulLtState(has_fp16_weights=False, threshold=threshold)
    state.CB, state.SCB, _ = F.int8_vectorwise_quant(torch.randn(48, 64))
    x = torch.randn(5, 64, requires_grad=True)
    y = compiled(lambda x: bnb.matmul(x, state.CB, state=state))(x)
    indices = state.idx
    assert torch.equal(y, bnb.matmul(x, state.CB, state=state))
    assert indices is None if threshold == 0 else torch.equal(indices, state.idx)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(grad, torch.autograd.grad(bnb.matmul(x, state.CB, state=state).square().sum(), x)[0])


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_matmul_of_trained_weights(threshold):
    state = bnb.MatmulLtState(threshold=threshold)
    weight = torch.nn.Parameter(torch.randn(48, 64))
    bias = torch.nn.Parameter(torch.randn(48))
    x = torch.randn(5, 64, requires_grad=True)
    y = compiled(lambda x: bnb.matmul(x, weight, state=state, bias=bias))(x)
    grads = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    expected = bnb.matmul(x, weight, state=bnb.MatmulLtState(threshold=threshold), bias=bias)
    assert torch.equal(y, expected)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), (x, weight, bias))):
        assert torch.equal(grad, wanted)


def test_make_fx_records_ops_not_values():
    from torch.fx.experimental.proxy_tensor import make_fx

    packed, state = F.quantize_4bit(torch.randn(48, 64), compress_statistics=True)
    graph = make_fx(lambda x: bnb.matmul_4bit(x, packed, state))(torch.randn(5, 64))
    x = torch.randn(5, 64)
    assert torch.equal(graph(x), bnb.matmul_4bit(x, packed, state))


def test_fake_tensors_get_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        packed, state = F.quantize_4bit(torch.empty(48, 33), compress_statistics=True)
        assert packed.shape == (792, 1)
        assert state.absmax.shape == (25,)
        assert state.state2.absmax.shape == (1,)
        assert bnb.matmul_4bit(torch.empty(2, 33), packed, state).shape == (2, 48)
        assert F.dequantize_4bit(packed, state).shape == (48, 33)


def test_fake_outputs_are_checked_too():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        packed, state = F.quantize_4bit(torch.empty(48, 64))
        for out in (torch.empty(1, 5, 48), torch.empty(5, 48).half()):
            with pytest.raises(bnb.errors.InvalidArgumentError, match="out for y is"):
                bnb.matmul_4bit(torch.empty(5, 64), packed, state, out=out)
