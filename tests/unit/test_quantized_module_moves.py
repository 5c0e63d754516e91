"""Modules with a quantized weight keep every bit of it: casts, devices, shared memory, copies, pickles."""

import copy
import gc
import inspect
import io
import pickle

import pytest
import torch
from quantized_layers import IN, OUT, bits, every, load, plain_weight, without_bias

from bnb_core import nn
from bnb_core.quantization.layout import as_bytes

# -------------------------------------------------------------------------------------------------------------------------- moving


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.float16),
    "to-device": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
}


@every
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("replace", [lambda m: m, plain_weight], ids=["parameter", "plain"])
def test_casts_leave_the_weight_alone(make, cast, replace):
    module = replace(make().to("cpu"))
    before, kind = without_bias(bits(module)), type(module.weight)
    dtype = module.bias.dtype
    parameter = module.weight
    cast(module)
    assert without_bias(bits(module)) == before
    assert module.bias.dtype != dtype
    assert type(module.weight) is kind
    assert module.weight is parameter


@every
@pytest.mark.skipif(
    not hasattr(torch.__future__, "set_swap_module_params_on_conversion"), reason="torch has one way to move modules"
)
@pytest.mark.parametrize("move", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("replace", [lambda m: m, plain_weight], ids=["parameter", "plain"])
def test_modules_that_swap_their_parameters(make, move, replace):
    module = replace(make().to("cpu"))
    expected = move(copy.deepcopy(module))
    parameter = module.weight
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        move(module)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert module.weight is parameter
    assert type(module.weight) is type(expected.weight)
    assert bits(module) == bits(expected)


@every
@pytest.mark.parametrize("replace", [lambda m: m, plain_weight], ids=["parameter", "plain"])
def test_to_meta_and_back_from_a_checkpoint(make, replace):
    module = make().to("cpu")
    x, saved = torch.randn(3, IN), copy.deepcopy(module.state_dict())
    y = module(x)
    kind = type(replace(module).weight)
    module.to("meta")
    assert type(module.weight) is kind
    statistics = module.quant_state.absmax if hasattr(module, "quant_state") else module.state.SCB
    assert module.weight.is_meta
    assert statistics.is_meta
    module.to_empty(device="cpu")
    assert not module.weight.is_meta
    load(module, saved)
    assert torch.equal(module(x), y)


@every
def test_unquantized_to_meta(make):
    module = make().to("meta")
    assert type(module.weight) in (nn.Params4bit, nn.Int8Params)
    assert module.weight.shape == (OUT, IN)
    module.to_empty(device="cpu")
    assert module.weight.is_floating_point()  # a device for empty memory is no reason to quantize it
    module.load_state_dict(torch.nn.Linear(IN, OUT).state_dict())
    module.to("cpu")
    assert module(torch.randn(3, IN)).isfinite().all()


@every
def test_made_on_meta(make):
    module = make(device="meta")
    assert module.weight.is_meta
    assert type(module.weight) in (nn.Params4bit, nn.Int8Params)
    assert module.to("meta").weight.shape == (OUT, IN)


@every
@pytest.mark.skipif(not hasattr(torch, "get_default_device"), reason="torch.device is no context yet")
def test_made_in_a_device_context(make):
    with torch.device("meta"):
        module = make()
    assert module.weight.is_meta
    assert module.bias.is_meta


@every
def test_skip_init(make):
    kind = type(make())
    module = torch.nn.utils.skip_init(kind, IN, OUT, device="cpu")
    assert not module.weight.is_meta
    assert module.weight.shape == (OUT, IN)
    load(module, torch.nn.Linear(IN, OUT).state_dict())
    assert module.to("cpu")(torch.randn(3, IN)).isfinite().all()


@every
def test_shared_memory(make):
    module = make().to("cpu")
    before = bits(module)
    module.share_memory()
    shared = {name: value.is_shared() for name, value in module.state_dict(keep_vars=True).items()}
    made_anew = ("nested_quant_map", "bitsandbytes__", "weight_format")
    assert all(value for name, value in shared.items() if not any(part in name for part in made_anew))
    assert bits(module) == before


@every
def test_freezing_a_model(make):
    module = make().to("cpu").requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module(torch.randn(2, IN)).requires_grad


@every
def test_optimizers_keep_their_parameters(make):
    module = make()
    before = list(module.parameters())
    module.to("cpu").half()
    assert all(a is b for a, b in zip(module.parameters(), before))


@every
def test_no_floating_point_copy_survives(make):
    module = make(bias=False)
    module.to("cpu")
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    assert not [t for t in tensors if t.is_floating_point() and t.shape == (OUT, IN)]


# -------------------------------------------------------------------------------------------------------------------------- copies


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, **({"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}))


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "save": through_torch_save}


@every
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("replace", [lambda m: m, plain_weight], ids=["parameter", "plain"])
def test_copies_are_whole_and_apart(make, duplicate, replace):
    module = replace(make().to("cpu"))
    x = torch.randn(3, IN)
    y, before = module(x), bits(module)
    result = duplicate(module)
    assert bits(result) == before
    assert type(result.weight) is type(module.weight)
    for value in result.state_dict(keep_vars=True).values():
        as_bytes(value.data).fill_(1)
    assert bits(module) == before
    assert torch.equal(module(x), y)


@every
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_made_before_quantization_quantizes_itself(make, duplicate):
    module = make()
    result = duplicate(module).to("cpu")
    assert module.weight.is_floating_point()
    assert module.weight.shape == (OUT, IN)
    assert bits(result) == bits(module.to("cpu"))


@every
def test_a_copy_owns_its_statistics(make):
    module = make().to("cpu")
    result = copy.deepcopy(module)
    if hasattr(module, "quant_state"):
        assert result.weight.module is result
        assert result.weight.quant_state is result.quant_state is not module.quant_state
    else:
        assert result.weight.SCB is result.state.SCB is not module.state.SCB


@every
def test_shallow_copy(make):
    module = make().to("cpu")
    x = torch.randn(3, IN)
    assert torch.equal(copy.copy(module)(x), module(x))
