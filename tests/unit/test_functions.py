"""Products as autograd functions: the same values and gradients as `matmul_4bit` and `matmul`."""

import pytest
import torch

import bnb_core as bnb
from bnb_core import functional as F
from bnb_core.autograd._functions import MatMul4Bit, MatMul8bitFp, MatMul8bitLt
from bnb_core.errors import InvalidArgumentError


def inputs(*shape, out_features=24):
    x = torch.randn(*shape).requires_grad_()
    bias = torch.randn(out_features).requires_grad_()
    return x, bias, torch.randn(*shape[:-1], out_features)


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40), (0, 40)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit(shape, nested):
    packed, state = F.quantize_4bit(torch.randn(24, 40), quant_type="nf4", compress_statistics=nested)
    x, bias, g = inputs(*shape)
    y = MatMul4Bit.apply(x, packed, None, bias, state)
    expected = bnb.matmul_4bit(x, packed, state, bias=bias)
    assert torch.equal(y, expected)
    for grad, wanted in zip(torch.autograd.grad(y, (x, bias), g), torch.autograd.grad(expected, (x, bias), g)):
        assert torch.equal(grad, wanted)


def test_four_bit_needs_a_state():
    packed, _ = F.quantize_4bit(torch.randn(24, 40))
    with pytest.raises(InvalidArgumentError, match="MatMul4Bit: the state of the weight is None"):
        MatMul4Bit.apply(torch.randn(2, 40), packed)


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("trained", [False, True])
def test_int8(shape, threshold, trained):
    weight = torch.randn(24, 40).requires_grad_(trained)
    x, bias, g = inputs(*shape)
    states = [bnb.MatmulLtState(threshold=threshold) for _ in range(2)]
    y = MatMul8bitLt.apply(x, weight, None, bias, states[0])
    expected = bnb.matmul(x, weight, state=states[1], bias=bias)
    assert torch.equal(y, expected)
    assert torch.equal(states[0].CB, states[1].CB)
    assert states[0].idx is None if threshold == 0.0 else torch.equal(states[0].idx, states[1].idx)
    wanted = (x, bias, weight) if trained else (x, bias)
    for grad, other in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g)):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40)], ids=str)
def test_dequantized(shape):
    weight = torch.randn(24, 40).requires_grad_()
    x, bias, g = inputs(*shape)
    y = MatMul8bitFp.apply(x, weight, None, bias, None)
    codes, absmax, _ = F.int8_vectorwise_quant(weight.detach())
    values = F.int8_vectorwise_dequant(codes, absmax).requires_grad_()
    expected = torch.nn.functional.linear(x, values, bias)
    torch.testing.assert_close(y, expected)
    for grad, wanted in zip(torch.autograd.grad(y, (x, weight, bias), g), torch.autograd.grad(expected, (x, values, bias), g)):
        torch.testing.assert_close(grad, wanted)


def test_dequantized_has_no_outliers():
    with pytest.raises(InvalidArgumentError, match=r"MatMul8bitFp: the state's threshold is 6\.0"):
        MatMul8bitFp.apply(torch.randn(2, 4), torch.randn(3, 4), None, None, bnb.MatmulLtState(threshold=6.0))


@pytest.mark.parametrize("function", [MatMul8bitLt, MatMul8bitFp])
def test_outputs_are_filled(function):
    x, weight, out = torch.randn(2, 40), torch.randn(24, 40), torch.empty(2, 24)
    y = function.apply(x, weight, out)
    assert y.data_ptr() == out.data_ptr()
    assert torch.equal(out, function.apply(x, weight))
    with pytest.raises(InvalidArgumentError, match="out is"):
        function.apply(x, weight, torch.empty(3, 24))


def test_states_take_nothing_that_has_no_effect():
    codes, absmax, idx = torch.zeros(2, 2, dtype=torch.int8), torch.ones(2), torch.tensor([1])
    state = bnb.MatmulLtState(CB=codes, SCB=absmax, idx=idx)
    assert state.CB is codes
    assert state.SCB is absmax
    assert state.idx is idx
    with pytest.raises(InvalidArgumentError, match="MatmulLtState: nothing depends on force_no_igemmlt, SBt"):
        bnb.MatmulLtState(True, SBt=absmax)
