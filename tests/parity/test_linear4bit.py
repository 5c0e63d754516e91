"""Linear4bit against that of bitsandbytes: the same bytes from the same weights, and checkpoints that go both ways."""

import itertools

import pytest
import torch

import bnb_core
from bnb_core import nn

peer = pytest.importorskip("bitsandbytes")

IN, OUT = 192, 40
STORAGE = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
FORMATS = [*itertools.product(["nf4", "fp4"], [False, True], STORAGE), ("nf4", True, torch.int8), ("nf4", True, torch.float64)]
settings = pytest.mark.parametrize(("quant_type", "nested", "storage"), FORMATS, ids=str)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(quant_type, nested, storage, dtype=torch.float32, bias=True):
    """The two libraries' modules, quantized from the same weights."""
    source = torch.nn.Linear(IN, OUT, bias=bias).to(dtype)
    modules = []
    for library in (nn, peer.nn):
        arguments = {"quant_type": quant_type, "compress_statistics": nested, "quant_storage": storage}
        module = library.Linear4bit(IN, OUT, bias=bias, **arguments).to(dtype)
        module.load_state_dict(source.state_dict())
        modules.append(module.to("cpu"))
    return modules


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


@settings
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dicts_are_the_same(quant_type, nested, storage, dtype):
    ours, theirs = (module.state_dict() for module in pair(quant_type, nested, storage, dtype))
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        expected = theirs[name]
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape) or "quant_state" in name, name
        if not nested or name in ("weight", "bias", "weight.quant_map", "weight.nested_quant_map"):
            # bitsandbytes' nested offset, a mean in float32, may differ in its last bit, and with it whatever follows from it.
            assert same_bytes(value, expected), name


@settings
def test_their_checkpoints_load(quant_type, nested, storage, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, theirs = pair(quant_type, nested, storage)
    saved = theirs.state_dict()
    safetensors.save_file(saved, tmp_path / "model.safetensors")
    x = torch.randn(5, IN, requires_grad=True)
    expected = theirs(x)
    for module in (nn.Linear4bit(IN, OUT), nn.LinearNF4(IN, OUT).to("cpu"), nn.LinearFP4(IN, OUT, device="meta")):
        result = module.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        again = module.state_dict()
        assert list(again) == list(saved)
        assert all(same_bytes(value, saved[name]) for name, value in again.items())


@settings
def test_our_checkpoints_load_there(quant_type, nested, storage, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    ours, theirs = pair(quant_type, nested, storage)
    safetensors.save_file(ours.state_dict(), tmp_path / "model.safetensors")
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    theirs.weight = peer.nn.Params4bit.from_prequantized(
        saved.pop("weight"), {name: value for name, value in saved.items() if name != "bias"}, device="cpu", module=theirs
    )
    x = torch.randn(5, IN, requires_grad=True)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    assert all(same_bytes(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


@settings
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_close(quant_type, nested, storage, dtype):
    ours, theirs = pair(quant_type, nested, storage, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    results = []
    x = torch.randn(5, IN).to(dtype)
    for module in (ours, theirs):
        input_ = x.clone().requires_grad_()
        y = module(input_)
        y.float().square().sum().backward()
        results.append((y, input_.grad / 10, module.bias.grad / 10))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_parameters_have_the_same_attributes():
    ours, theirs = pair("nf4", True, torch.uint8)
    assert set(ours.weight.__dict__) == set(theirs.weight.__dict__)
    for name, value in theirs.weight.__dict__.items():
        if name not in ("module", "quant_state"):
            assert getattr(ours.weight, name) == value, name
    assert repr(ours) == repr(theirs)
    assert set(vars(theirs)) - set(vars(ours)) == {"support_avx512bf16_for_cpu"}


def test_a_parameter_of_theirs_is_rebuilt_as_ours():
    _, theirs = pair("nf4", False, torch.uint8)
    attributes = {**theirs.weight.__dict__, "module": None, "quant_state": None, "bnb_quantized": False}
    values = torch.randn(OUT, IN)
    weights = [library.nn.Params4bit(values, requires_grad=False, **attributes).to("cpu") for library in (peer, bnb_core)]
    assert torch.equal(weights[0].data, weights[1].data)
    assert torch.equal(weights[0].absmax, weights[1].absmax)
