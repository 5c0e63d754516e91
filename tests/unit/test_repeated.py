"""Products with the same 4-bit weight again and again: whatever changes between two calls is seen, and the calls cost little."""

import copy
import pickle
import sys
import timeit

import pytest
import torch

from bnb_core import ops
from bnb_core.backends import ANY_DEVICE, Backend, register, use_backend
from bnb_core.errors import InvalidArgumentError
from bnb_core.nn import LinearNF4
from bnb_core.ops.plain import REGISTERED
from bnb_core.quantization.four_bit import quantize_4bit

N, K = 12, 70


@pytest.fixture(params=[False, True], ids=["plain", "nested"])
def weight(request):
    return quantize_4bit(torch.randn(N, K), compress_statistics=request.param, quant_type="nf4")


def expected(x, packed, state, bias=None):
    """The product by an op that knows nothing of earlier calls."""
    return ops.gemm_4bit(x, packed, state.absmax, state.code, state.blocksize, N, K, bias, state.nested_statistics)


def check(x, packed, state, bias=None):
    with torch.no_grad():
        assert torch.equal(state.multiply(x, packed, bias), expected(x, packed, state, bias))


def test_any_input_after_any_other(weight):
    packed, state = weight
    x = torch.randn(3, K)
    inputs = [x, x, x.clone(), x[:1], x[:0], x[0], x.repeat(2, 1, 1), x.bfloat16(), torch.randn(K, 3).T, x[::2], x.expand(2, 3, K)]
    imaginary = torch.complex(x, x).conj().imag
    assert imaginary.is_neg()
    inputs += [imaginary.contiguous(), imaginary]
    for one in inputs:
        for other in inputs:
            check(one, packed, state)
            check(other, packed, state)


BAD = {
    "shape": lambda x: x[:, 1:],
    "dtype": torch.Tensor.double,
    "device": lambda x: x.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "nested": lambda x: torch.nested.nested_tensor([x]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_bad_input_after_a_good_one(weight, make):
    if make is BAD["nested"] and not hasattr(torch, "nested"):
        pytest.skip("this torch has no nested tensors")
    packed, state = weight
    x = torch.randn(3, K)
    bad = make(x)
    for _ in range(2):
        check(x, packed, state)
        with torch.no_grad(), pytest.raises(InvalidArgumentError):
            state.multiply(bad, packed)


def test_weights_and_statistics_that_change(weight):
    packed, state = weight
    x, bias = torch.randn(3, K), torch.randn(N)
    other_packed, other = quantize_4bit(torch.randn(N, K), compress_statistics=state.nested, quant_type="fp4")

    def in_place():
        packed.copy_(other_packed)

    def absmax():
        state.absmax = other.absmax

    def absmax_data():
        state.absmax.data = other.absmax.flip(0)

    def codebook():
        state.code = other.code

    def second():
        if state.nested:
            state.state2.absmax = state.state2.absmax * 2
            state.offset = state.offset + 1

    def bias_data():
        bias.data = torch.randn(N)

    check(x, packed, state, bias)
    for change in (in_place, absmax, absmax_data, codebook, second, bias_data):
        change()
        check(x, packed, state, bias)
        check(x, packed, state, bias)
        check(x, packed, state)


def test_statistics_that_become_wrong(weight):
    packed, state = weight
    x, bias = torch.randn(3, K), torch.randn(N)
    check(x, packed, state, bias)
    for wrong in (packed[1:], torch.cat([packed, packed]), packed.char()):
        with torch.no_grad(), pytest.raises(InvalidArgumentError, match="packed"):
            state.multiply(x, wrong, bias)
        check(x, packed, state, bias)
    bias.data = torch.randn(N + 1)
    with torch.no_grad(), pytest.raises(InvalidArgumentError, match="bias"):
        state.multiply(x, packed, bias)
    absmax = state.absmax
    absmax.data = absmax[1:].clone()
    with torch.no_grad(), pytest.raises(InvalidArgumentError, match="absmax"):
        state.multiply(x, packed)


def test_gradients_between_calls_without(weight):
    packed, state = weight
    x = torch.randn(3, K, requires_grad=True)
    for _ in range(2):
        check(x, packed, state)
        y = state.multiply(x, packed)
        grad = torch.autograd.grad(y.sum(), x)[0]
        assert torch.equal(grad, torch.autograd.grad(expected(x, packed, state).sum(), x)[0])


def test_each_call_chooses_its_backend(weight, register_recorder):
    packed, state = weight
    other = register_recorder("other", factor=2)
    x = torch.randn(3, K)
    check(x, packed, state)
    y = expected(x, packed, state)
    with torch.no_grad(), use_backend("other"):
        assert torch.equal(state.multiply(x, packed), 2 * y)
    assert other.ran == ["gemm_4bit"]
    check(x, packed, state)


def test_copies_do_not_have_what_is_kept_of_calls(weight):
    packed, state = weight
    x = torch.randn(3, K)
    size = len(pickle.dumps(state))
    check(x, packed, state, torch.randn(N))
    assert len(pickle.dumps(state)) == size
    for made in (copy.deepcopy(state), copy.copy(state), pickle.loads(pickle.dumps(state))):
        assert made == state
        check(x, packed.clone(), made)


def test_what_is_kept_does_not_outlive_a_move(weight):
    import weakref

    packed, state = weight
    check(torch.randn(3, K), packed, state)
    absmax = weakref.ref(state.absmax)
    state.to("meta")
    assert absmax() is None


@pytest.mark.skipif(not REGISTERED or sys.version_info >= (3, 12), reason="other Pythons and torches have other costs")
def test_a_call_costs_little_more_than_one_of_linear():
    """The unit is what `torch.nn.Linear` takes over `F.linear`, so that the bound means the same on any machine."""
    x, dense = torch.randn(1, 64), torch.nn.Linear(64, 64)
    layers = [LinearNF4(64, 64, compress_statistics=nested).to("cpu") for nested in (False, True)]
    nothing = Backend("nothing", api_version=(1, 0), priority=-1)

    @nothing.kernel("gemm_4bit", devices={ANY_DEVICE}, dtypes=[torch.float32])
    def gemm_4bit(x, packed, absmax, codebook, blocksize, N, K, bias, nested, *, out):
        pass

    register(nothing)
    weight, bias = dense.weight.detach(), dense.bias.detach()
    calls = [lambda: torch.nn.functional.linear(x, weight, bias), *(lambda m=m: m(x) for m in (dense, *layers))]
    with torch.no_grad(), use_backend("nothing"):
        runs = [[timeit.timeit(call, number=100) for call in calls] for _ in range(200)]
    linear, module, *quantized = map(min, zip(*runs))
    for time in quantized:
        assert time - linear < 4 * (module - linear)
