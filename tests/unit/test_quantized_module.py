"""What every module with a quantized weight does alike: products and gradients, moving, copying, saving, loading."""

import copy
import gc
import inspect
import io
import pickle

import pytest
import torch

from bnb_core import nn, ops
from bnb_core.errors import BnbError, InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.quantization.layout import as_bytes
from bnb_core.testing import oracle
from bnb_core.testing.tolerances import as_numpy, assert_product

IN, OUT = 48, 20
ASSIGNS = "assign" in inspect.signature(torch.nn.Module.load_state_dict).parameters

MAKERS = {
    "nf4": lambda **kw: nn.LinearNF4(IN, OUT, compress_statistics=False, **kw),
    "nf4-nested": lambda **kw: nn.LinearNF4(IN, OUT, **kw),
    "fp4-bfloat16": lambda **kw: nn.LinearFP4(IN, OUT, quant_storage=torch.bfloat16, **kw),
    "nf4-float32": lambda **kw: nn.LinearNF4(IN, OUT, quant_storage=torch.float32, **kw),
    "int8": lambda **kw: nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, **kw),
    "int8-threshold": lambda **kw: nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=2.0, **kw),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
assigning = pytest.mark.parametrize(
    "assign",
    [False, pytest.param(True, marks=pytest.mark.skipif(not ASSIGNS, reason="load_state_dict cannot assign"))],
    ids=["copy", "assign"],
)


def weight_of(module):
    """The float32 values that the weight stands for, read without the parameter's help."""
    data = module.weight.data
    if data.dtype == torch.int8:
        return ops.int8_dequantize_rows(data, module.state.SCB, torch.float32)
    s = module.quant_state
    return ops.dequantize_4bit(as_bytes(data), s.absmax, s.code, s.blocksize, s.shape, torch.float32, s.nested_statistics)


def expected_product(module, x):
    rows, bias = as_numpy(x).reshape(-1, IN), None if module.bias is None else as_numpy(module.bias.to(x.dtype))
    if module.weight.dtype == torch.int8:
        codes, absmax = as_numpy(module.weight), as_numpy(module.state.SCB)
        return oracle.int8_linear(rows, codes, absmax, bias, module.state.threshold)
    return oracle.product(rows, as_numpy(weight_of(module)), bias)


def bits(module):
    """Every tensor of a module as dtype, shape and bytes, by its name in a checkpoint."""
    return {
        name: (value.dtype, value.shape, value.device, None if value.is_meta else bytes(as_bytes(value).tolist()))
        for name, value in module.state_dict().items()
    }


def without_bias(entries):
    return {name: value for name, value in entries.items() if "bias" not in name}


def load(module, entries, assign=False, strict=True):
    return module.load_state_dict(entries, strict=strict, **({"assign": True} if assign else {}))


def plain_weight(module):
    """Replace the parameter by an ordinary one, as sharding does."""
    module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
    return module


# ---------------------------------------------------------------------------------------------------------- products and gradients


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_product_is_within_its_bound(make, dtype, bias):
    module = make(bias=bias).to("cpu")
    x = torch.randn(7, IN).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert_product(y, expected_product(module, x), "y")


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_within_their_bound(make, dtype):
    module = make().to("cpu")
    x = torch.randn(7, IN).to(dtype).requires_grad_()
    g = torch.randn(7, OUT).to(dtype)
    module(x).backward(g)
    assert x.grad.dtype == dtype
    weight = as_numpy(weight_of(module))
    assert_product(x.grad, oracle.product(as_numpy(g), weight.T), "the gradient of x")
    total = oracle.product(torch.ones(1, 7).numpy(), as_numpy(g).T)
    assert_product(module.bias.grad.to(dtype), total._replace(y=total.y[0]), "the gradient of the bias")
    assert module.weight.grad is None


@every
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 1, 2), (2, 3, 2, 2)], ids=str)
def test_any_leading_shape(make, shape):
    module = make().to("cpu")
    x = torch.randn(*shape, IN, requires_grad=True)
    y = module(x)
    assert y.shape == (*shape, OUT)
    assert torch.equal(y, module(x.reshape(-1, IN)).reshape(y.shape))
    y.sum().backward()
    assert x.grad.shape == x.shape


@every
def test_inputs_need_not_be_contiguous(make):
    module = make().to("cpu")
    x = torch.randn(IN, 6).t()
    assert torch.equal(module(x), module(x.contiguous()))


@every
def test_gradients_flow_through_a_chain(make):
    first, second = torch.nn.Linear(IN, IN), make().to("cpu")
    x = torch.randn(5, IN)
    second(first(x)).square().sum().backward()
    g = 2 * second(first(x)).detach() @ weight_of(second)
    torch.testing.assert_close(first.weight.grad, g.t() @ x, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_changes_nothing_in_the_module(make, dtype):
    module = make().to("cpu")
    attributes = {name: copy.copy(value) for name, value in module.__dict__.items() if not isinstance(value, dict)}
    tensors = {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items() if "bitsandbytes__" not in name}
    before = bits(module)
    for mode in (True, False):
        module.train(mode)
        module(torch.randn(3, IN).to(dtype).requires_grad_()).sum().backward()
    module.train()
    assert bits(module) == before
    after = {name: value for name, value in module.__dict__.items() if not isinstance(value, dict)}
    assert str(after) == str(attributes)
    kept = {"nested_quant_map", "weight_format"}  # made anew for each checkpoint
    now = {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items() if "bitsandbytes__" not in name}
    assert {n: p for n, p in now.items() if n.split(".")[-1] not in kept} == {
        n: p for n, p in tensors.items() if n.split(".")[-1] not in kept
    }


@every
def test_inference_mode(make):
    module = make().to("cpu")
    x = torch.randn(3, IN)
    with torch.inference_mode():
        y = module(x)
    assert torch.equal(y, module(x))


@every
def test_autocast_does_not_lower_the_precision(make):
    module = make().to("cpu")
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert_product(y, expected_product(module, x), "y")


@every
def test_tensors_and_attributes_of_ordinary_linear(make):
    module = make()
    assert isinstance(module, torch.nn.Linear)
    assert (module.in_features, module.out_features) == (IN, OUT)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert module.bias.requires_grad
    assert make(bias=False).bias is None


# ----------------------------------------------------------------------------------------------------------------------- bad input


@every
def test_wrong_inputs_raise_one_typed_error(make):
    module = make().to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"\[3, 47\].*48"):
        module(torch.randn(3, IN - 1))
    with pytest.raises(InvalidArgumentError, match=r"\[3, 20\].*48"):
        module(torch.randn(3, OUT))  # not taken for a product with the transposed weight either
    with pytest.raises(InvalidArgumentError, match=r"int64.*cast"):
        module(torch.ones(3, IN, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match=r"float64"):
        module(torch.randn(3, IN, dtype=torch.float64))
    with pytest.raises(InvalidArgumentError, match=r"last dimension"):
        module(torch.randn(()))
    with pytest.raises(InvalidArgumentError, match=r"different devices.*meta"):
        module(torch.randn(3, IN, device="meta"))


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


# ---------------------------------------------------------------------------------------------------------- saving and loading


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


# ------------------------------------------------------------------------------------------------------- ordinary parameters, ties


@every
def test_an_ordinary_parameter_serves(make):
    module = make().to("cpu")
    x = torch.randn(3, IN)
    y, before = module(x), bits(module)
    plain_weight(module)
    assert torch.equal(module(x), y)
    assert bits(module) == before
    module.to("cpu")
    assert torch.equal(module(x), y)


@every
def test_swapped_data_serve(make):
    module = make().to("cpu")
    x = torch.randn(3, IN)
    y = module(x)
    whole = module.weight.data
    module.weight.data = torch.empty(0, dtype=whole.dtype)
    module.weight.data = whole.clone()
    assert torch.equal(module(x), y)


@every
def test_a_parameter_that_is_set_brings_its_statistics(make):
    module, other = make().to("cpu"), make().to("cpu")
    module.bias = other.bias
    module.weight = other.weight
    plain_weight(module)
    x = torch.randn(3, IN)
    assert torch.equal(module(x), other(x))


@every
def test_a_parameter_that_is_slipped_in_brings_its_statistics(make):
    """Loaders write to `_parameters`, without the module's knowing."""
    module, other = make().to("cpu"), make().to("cpu")
    module._parameters["weight"] = copy.deepcopy(other.weight)
    module.bias = other.bias
    x = torch.randn(3, IN)
    assert torch.equal(module(x), other(x))
    assert bits(module) == bits(other)


@every
def test_tied_weights(make):
    model = torch.nn.ModuleList([make(), make()])
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    model.to("cpu").half()
    assert model[1].weight is model[0].weight
    x = torch.randn(3, IN)
    assert torch.equal(model[1](x), model[0](x))
    assert_product(model[1](x), expected_product(model[0], x), "y")
    source = torch.nn.ModuleList([make(), make()]).to("cpu").half()
    source[1].weight, source[1].bias = source[0].weight, source[0].bias
    load(model, source.state_dict())
    assert model[1].weight is model[0].weight
    assert torch.equal(model[1](x), source[0](x))
    twin = copy.deepcopy(model)
    assert twin[1].weight is twin[0].weight
    assert torch.equal(twin[1](x), source[0](x))


# ---------------------------------------------------------------------------------------------------------------------- transforms


@every
@pytest.mark.skipif(not REGISTERED, reason="function transforms need registered ops")
def test_function_transforms(make):
    module = make().to("cpu")
    x = torch.randn(4, 3, IN)
    # One by one: which columns are outliers depends on the rows that are given together.
    torch.testing.assert_close(torch.func.vmap(module)(x), torch.stack([module(rows) for rows in x]))
    g = torch.func.grad(lambda x: module(x).square().sum())(x)
    twin = x.clone().requires_grad_()
    module(twin).square().sum().backward()
    torch.testing.assert_close(g, twin.grad)


@every
@pytest.mark.skipif(not REGISTERED, reason="tracing needs registered ops")
def test_tracing(make):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make().to("cpu")
    x, other = torch.randn(3, IN), torch.randn(3, IN)
    assert torch.equal(make_fx(module)(x)(other), module(other))
    assert torch.equal(torch.export.export(module, (x,), strict=False).module()(other), module(other))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(torch.randn(7, IN)).shape == (7, OUT)


@every
@pytest.mark.skipif(not REGISTERED, reason="checkpointing without reentry is that of newer torch")
def test_activation_checkpointing(make):
    from torch.utils.checkpoint import checkpoint

    module = make().to("cpu")
    x = torch.randn(3, IN, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    module(x).square().sum().backward()
    gradients = module.bias.grad.clone()
    module.bias.grad = None
    checkpoint(module, twin, use_reentrant=False).square().sum().backward()
    assert torch.equal(twin.grad, x.grad)
    assert torch.equal(module.bias.grad, gradients)
