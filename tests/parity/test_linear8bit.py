"""Linear8bitLt against that of bitsandbytes: the same codes from the same weights, and checkpoints that go both ways."""

import pytest
import torch

import bnb_core
from bnb_core import nn

peer = pytest.importorskip("bitsandbytes")

IN, OUT = 192, 40
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(dtype=torch.float16, threshold=0.0):
    """The two libraries' modules, quantized from the same weights."""
    source = torch.nn.Linear(IN, OUT).to(dtype)
    modules = []
    for library in (nn, peer.nn):
        module = library.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold).to(dtype)
        module.load_state_dict(source.state_dict())
        modules.append(module.to("cpu"))
    return modules


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        expected = theirs[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_state_dicts_are_the_same(scale):
    values = (torch.randn(OUT, IN) * scale).half()
    values[3] = 0
    exact = values.double() * 127 / values.double().abs().amax(1, keepdim=True).clamp(min=1e-30)
    halfway = (exact - exact.floor() == 0.5).nonzero(as_tuple=True)
    assert halfway[0].numel()  # float16 has few values, so that some lie halfway between codes
    values[halfway] *= 0.9
    saved = []
    for library in (nn, peer.nn):
        module = library.Linear8bitLt(IN, OUT, has_fp16_weights=False, bias=False)
        module.weight.data = values.clone()
        saved.append(module.to("cpu").state_dict())
    assert_same(*saved)


def test_codes_of_values_halfway_between_two():
    """Here they depend on one rounding, in bitsandbytes on two: it takes a reciprocal first."""
    values = torch.full((40, 2), 0.5, dtype=torch.float16)
    values[:, 0] = 1.0 + torch.arange(40) / 64
    values[:, 1] = values[:, 0] / 2
    ours, theirs = (library.nn.Int8Params(values.clone(), requires_grad=False).to("cpu") for library in (bnb_core, peer))
    scale = torch.full((40,), 127.0) / values[:, 0].float()
    assert torch.equal(ours.data[:, 1], (values[:, 1] * scale).round().to(torch.int8))
    assert (ours.data.int() - theirs.data.int()).abs().max() == 1
    assert torch.equal(ours.data[:, 0], theirs.data[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_float16_would_round_differ_by_one_step_at_most(dtype):
    """bitsandbytes casts weights to float16 first."""
    ours, theirs = (module.state_dict() for module in pair(dtype))
    assert (ours["weight"].int() - theirs["weight"].int()).abs().max() <= 1
    torch.testing.assert_close(ours["SCB"], theirs["SCB"], rtol=2**-11, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_their_checkpoints_load(threshold, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, theirs = pair(threshold=threshold)
    for used in (False, True):
        if used:
            theirs.eval()(torch.randn(2, IN).half())  # it moves its statistics
        saved = theirs.state_dict()
        safetensors.save_file(saved, tmp_path / "model.safetensors")
        for device in (None, "cpu", "meta"):
            module = nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold).half()
            if device is not None:
                module.to(device)
            result = module.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=True)
            assert not result.missing_keys
            assert not result.unexpected_keys
            assert_same(module.state_dict(), saved)


def test_our_checkpoints_load_there(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, _ = pair()
    _, theirs = pair()
    safetensors.save_file(ours.state_dict(), tmp_path / "model.safetensors")
    theirs.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=True)
    assert_same(ours.state_dict(), theirs.state_dict())
    x = torch.randn(5, IN).half()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_close(threshold, dtype):
    ours, theirs = pair(dtype, threshold)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, IN).to(dtype)
    results = []
    for module in (ours.eval(), theirs.eval()):
        input_ = x.clone().requires_grad_()
        y = module(input_)
        y.float().sum().backward()
        results.append((y, input_.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_parameters_and_states_have_the_same_attributes():
    ours, theirs = pair(threshold=6.0)
    assert set(ours.weight.__dict__) == set(theirs.weight.__dict__)
    assert ours.weight.has_fp16_weights == theirs.weight.has_fp16_weights
    for name in ("threshold", "has_fp16_weights", "use_pool", "is_training", "idx"):
        assert getattr(ours.state, name) == getattr(theirs.state, name), name
    assert repr(ours) == repr(theirs)
    assert set(vars(theirs)) - set(vars(ours)) == set()
    ours.init_8bit_state()
    theirs.init_8bit_state()
    assert torch.equal(ours.state.CB, theirs.state.CB)
    assert torch.equal(ours.state.SCB, theirs.state.SCB)
