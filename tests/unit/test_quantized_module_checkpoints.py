"""Modules with a quantized weight load and save: checkpoints of any kind, into a module in any state."""

import copy

import pytest
import torch
from quantized_layers import IN, OUT, assigning, bits, every, load, plain_weight, without_bias

from bnb_core import nn
from bnb_core.errors import BnbError


def fresh(make):
    return make()


def quantized(make):
    return make().to("cpu")


def on_meta(make):
    return make(device="meta")


def quantized_on_meta(make):
    return make().to("cpu").to("meta")


def plain(make):
    return plain_weight(make().to("cpu"))


TARGETS = [fresh, quantized, on_meta, quantized_on_meta, plain]


@every
@pytest.mark.parametrize("target", TARGETS)
@assigning
def test_a_quantized_checkpoint_loads_into_a_module_in_any_state(make, target, assign):
    source, module = make().to("cpu"), target(make)
    x, saved = torch.randn(3, IN), source.state_dict()
    kept = bits(source)
    result = load(module, saved, assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert bits(module) == kept
    assert torch.equal(module(x), source(x))
    assert torch.equal(module.to("cpu")(x), source(x))  # not quantized once more
    shared = module.weight.data_ptr() == saved["weight"].data_ptr()
    assert shared == assign


@every
@assigning
def test_floating_point_weights_load_into_a_fresh_module(make, assign):
    source, module = torch.nn.Linear(IN, OUT), make()
    load(module, source.state_dict(), assign)
    assert torch.equal(module.weight.data, source.weight)
    assert type(module.weight) in (nn.Params4bit, nn.Int8Params)
    reference = make()
    reference.weight.data, reference.bias.data = source.weight.data.clone(), source.bias.data
    assert bits(module.to("cpu")) == bits(reference.to("cpu"))


@every
@assigning
def test_floating_point_weights_that_load_into_a_quantized_module_are_quantized(make, assign):
    source, module, reference = torch.nn.Linear(IN, OUT), make().to("cpu"), make()
    values = source.weight.detach().clone()
    for target in (module, reference):
        load(target, source.state_dict(), assign)
    assert bits(module) == bits(reference.to("cpu"))
    assert torch.equal(source.weight, values)


@every
def test_an_unquantized_module_saves_what_a_linear_saves(make):
    assert list(make().state_dict()) == ["weight", "bias"]


@every
def test_loading_twice_keeps_the_parameter(make):
    module, source = make().to("cpu"), make().to("cpu")
    parameter = module.weight
    load(module, source.state_dict())
    assert module.weight is parameter


@every
@pytest.mark.parametrize("target", TARGETS)
def test_missing_entries_are_reported_and_the_weight_is_left_alone(make, target):
    saved = {f"layer.{name}": value for name, value in make(bias=False).to("cpu").state_dict().items()}
    for name in saved.keys() - {"layer.weight", "layer.weight_format"}:
        model = torch.nn.ModuleDict({"layer": target(lambda **kw: make(bias=False, **kw))})
        before = bits(model) if target is not quantized_on_meta else None
        incomplete = {key: value for key, value in saved.items() if key != name}
        with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
            load(model, incomplete)
        result = load(model, incomplete, strict=False)
        assert result.missing_keys == [name]
        assert not result.unexpected_keys
        if before is not None:
            assert bits(model) == before


@every
def test_a_checkpoint_without_the_weight(make):
    saved = make().to("cpu").state_dict()
    del saved["weight"]
    module = make()
    before = bits(module)
    result = load(module, {"bias": saved["bias"]}, strict=False)
    assert result.missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        load(make(), saved)
    assert without_bias(bits(module)) == without_bias(before)


@every
def test_other_keys_are_still_unexpected(make):
    saved = make().to("cpu").state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weigth"):
        load(make(), {**saved, "weigth": torch.zeros(1)})


@every
@pytest.mark.parametrize("shape", [(OUT, IN + 2), (OUT + 2, IN), (IN, OUT)], ids=str)
def test_a_weight_of_another_shape(make, shape):
    kind = type(make())
    settings = {"has_fp16_weights": False} if kind is nn.Linear8bitLt else {}
    source = kind(shape[1], shape[0], bias=False, **settings)
    for target in (fresh, quantized):
        module = target(lambda: make(bias=False))
        before = bits(module)
        with pytest.raises((RuntimeError, BnbError), match=r"size mismatch"):
            load(module, source.state_dict())
        with pytest.raises((RuntimeError, BnbError), match=r"size mismatch"):
            load(module, copy.deepcopy(source).to("cpu").state_dict())
        assert bits(module) == before


@every
def test_a_weight_that_is_no_tensor(make):
    with pytest.raises(RuntimeError, match=r"expected torch.Tensor"):
        load(make().to("cpu"), {"weight": [1.0], "bias": torch.zeros(OUT)}, strict=False)


@every
@pytest.mark.parametrize("target", [fresh, quantized])
def test_through_a_file(make, target, tmp_path):
    source, module = make().to("cpu"), target(make)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    load(module, torch.load(tmp_path / "model.pt"))
    assert bits(module) == bits(source)


@every
def test_through_safetensors(make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source = torch.nn.Sequential(make(), torch.nn.ReLU(), torch.nn.Linear(OUT, IN), make()).to("cpu")
    model = torch.nn.Sequential(make(), torch.nn.ReLU(), torch.nn.Linear(OUT, IN), make())
    safetensors.save_file(source.state_dict(), tmp_path / "model.safetensors")
    load(model, safetensors.load_file(tmp_path / "model.safetensors"))
    x = torch.randn(3, IN)
    assert torch.equal(model(x), source(x))


@every
@pytest.mark.parametrize("target", TARGETS)
def test_a_pre_hook_renames_the_entries(make, target):
    """Hooks of the module see the checkpoint first, once, and the weight is loaded under the names that they leave."""
    source, module, calls = make().to("cpu"), target(make), []

    def rename(state_dict, prefix, *_):
        calls.append(prefix)
        for name in [name for name in state_dict if name.startswith(f"{prefix}old_")]:
            state_dict[prefix + name[len(f"{prefix}old_") :]] = state_dict.pop(name)

    module._register_load_state_dict_pre_hook(rename)
    model = torch.nn.ModuleDict({"layer": module})
    load(model, {f"layer.old_{name}": value for name, value in source.state_dict().items()}, assign=False)
    assert calls == ["layer."]
    assert bits(module) == bits(source)
    assert list(module._load_state_dict_pre_hooks) != []


@every
def test_a_pre_hook_loads_the_weight_itself(make):
    module, values, kept = make().to("cpu"), torch.nn.Linear(IN, OUT).state_dict(), []
    before = bits(module)
    module._register_load_state_dict_pre_hook(lambda state_dict, prefix, *_: kept.append(state_dict.pop(f"{prefix}weight")))
    assert module.load_state_dict(values, strict=False).missing_keys[:1] == ["weight"]
    assert kept[0].data_ptr() == values["weight"].data_ptr()
    assert without_bias(bits(module)) == without_bias(before)
