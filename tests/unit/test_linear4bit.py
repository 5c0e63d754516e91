"""Linear4bit, LinearNF4 and LinearFP4: what is particular to 4-bit weights."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from bnb_core import functional
from bnb_core.errors import BnbError, CheckpointError, InvalidArgumentError, NotQuantizedError
from bnb_core.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from bnb_core.testing import oracle
from bnb_core.testing.tolerances import as_numpy, assert_product

IN, OUT = 128, 24
STORAGES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_constructor_arguments_reach_the_parameter():
    module = Linear4bit(IN, OUT, False, torch.float16, False, "nf4", torch.float32, "meta")
    weight = module.weight
    assert (module.in_features, module.out_features, module.bias) == (IN, OUT, None)
    assert (module.compute_dtype, module.compute_type_is_set, module.quant_storage) == (torch.float16, True, torch.float32)
    assert (weight.compress_statistics, weight.quant_type, weight.quant_storage) == (False, "nf4", torch.float32)
    assert weight.module is module
    assert weight.is_meta
    assert not weight.requires_grad


def test_defaults():
    module = Linear4bit(IN, OUT)
    assert (module.compute_dtype, module.compute_type_is_set, module.quant_state) == (None, False, None)
    assert (module.weight.quant_type, module.weight.compress_statistics) == ("fp4", True)
    assert module.bias is not None
    assert LinearNF4(IN, OUT).weight.quant_type == "nf4"
    assert LinearFP4(IN, OUT, False, torch.bfloat16, False, torch.float32).weight.quant_type == "fp4"


def test_bad_arguments():
    with pytest.raises(InvalidArgumentError, match=r"'nf5'.*'nf4'"):
        Linear4bit(IN, OUT, quant_type="nf5")
    with pytest.raises(InvalidArgumentError, match=r"compute_dtype is torch.float64.*float32"):
        Linear4bit(IN, OUT, compute_dtype=torch.float64)
    with pytest.raises(InvalidArgumentError, match=r"quant_storage torch.float32 \(4 bytes each\).*uint8"):
        Linear4bit(3, 3, quant_storage=torch.float32).to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"quant_storage is torch.bool"):
        Linear4bit(4, 4, quant_storage=torch.bool).to("cpu")


def test_an_unquantized_module_says_what_to_do():
    x = torch.randn(2, IN)
    with pytest.raises(NotQuantizedError, match=r"LinearNF4.*not quantized.*\.to\(device\)"):
        LinearNF4(IN, OUT)(x)
    module = LinearNF4(IN, OUT).to(torch.float16)
    module.weight = torch.nn.Parameter(module.weight.data)
    with pytest.raises(NotQuantizedError):
        module(x.half())


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(IN, OUT), (IN - 1, OUT - 1), (1, 1), (33, 1)], ids=str)
def test_shapes_and_blocksizes(shape, nested, blocksize):
    features, outputs = shape
    module = LinearNF4(features, outputs, compress_statistics=nested)
    values = module.weight.data.clone()
    module.weight.blocksize = blocksize
    module.to("cpu")
    packed, state = functional.quantize_4bit(values, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    assert torch.equal(module.weight.data, packed)
    assert module.quant_state == state
    assert module.quant_state is module.weight.quant_state
    x = torch.randn(3, features)
    weight = functional.dequantize_4bit(packed, state)
    assert_product(module(x), oracle.product(as_numpy(x), as_numpy(weight), as_numpy(module.bias)), "y")


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_whatever_the_shapes(data):
    features, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    leading = data.draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    quant_type, nested, bias = data.draw(st.sampled_from(["nf4", "fp4"])), data.draw(st.booleans()), data.draw(st.booleans())
    module = Linear4bit(features, outputs, bias, quant_type=quant_type, compress_statistics=nested)
    module.weight.blocksize = data.draw(st.sampled_from([32, 64, 1024]))
    module.weight.data *= data.draw(st.sampled_from([1e-4, 1.0, 1e4]))
    module.to("cpu")
    x = torch.randn(*leading, features).to(dtype)
    y = module(x)
    weight = functional.dequantize_4bit(module.weight.data, module.quant_state)
    assert (y.dtype, y.shape) == (dtype, (*leading, outputs))
    rows = as_numpy(x).reshape(-1, features)
    assert_product(y, oracle.product(rows, as_numpy(weight), as_numpy(module.bias.to(dtype)) if bias else None), "y")
    twin = Linear4bit(features, outputs, bias)
    assert not any(twin.load_state_dict(module.state_dict()))
    assert torch.equal(twin(x), y)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_storage_dtypes_hold_the_same_bytes(storage, quant_type):
    values, x = torch.randn(OUT, IN), torch.randn(3, IN)
    modules = []
    for dtype in (torch.uint8, storage):
        module = Linear4bit(IN, OUT, quant_type=quant_type, quant_storage=dtype, bias=False)
        module.weight.data = values.clone()
        modules.append(module.to("cpu"))
    expected, module = modules
    assert module.weight.dtype == storage
    assert module.weight.shape == (OUT * IN // 2 // module.weight.element_size(), 1)
    assert torch.equal(module.weight.data.view(torch.uint8).view(-1), expected.weight.data.view(-1))
    assert torch.equal(module(x), expected(x))


# ------------------------------------------------------------------------------------------------------------------- compute dtype


def computed_in(module, x):
    """The dtype of the product, told by its values."""
    weight = functional.dequantize_4bit(module.weight.data, module.quant_state).double()
    y, exact = module(x), x.double() @ weight.t()
    assert y.dtype == x.dtype
    error = ((y - exact).abs() / exact.abs().amax()).max()
    return torch.float32 if error < 1e-6 else torch.float16 if error < 8e-4 else torch.bfloat16


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_compute_dtype_holds_for_every_input(compute_dtype):
    module = LinearNF4(IN, OUT, bias=False, compute_dtype=compute_dtype).to("cpu")
    assert computed_in(module, torch.randn(8, IN)) == compute_dtype
    assert computed_in(module, torch.randn(8, IN, dtype=torch.float64)) == compute_dtype
    x = torch.randn(8, IN).bfloat16()
    assert torch.equal(module(x), module(x.to(compute_dtype)).bfloat16())


def test_without_a_compute_dtype_each_input_decides_for_itself():
    module = LinearNF4(IN, OUT).to("cpu")
    x = torch.randn(8, IN)
    before = module(x)
    for dtype in (torch.float16, torch.bfloat16):
        module(x.to(dtype))
    assert torch.equal(module(x), before)
    assert module.compute_dtype is None
    assert module.bias.dtype == torch.float32


def test_a_compute_dtype_that_is_not_declared_set_is_for_float16():
    module = LinearNF4(IN, OUT, bias=False).to("cpu")
    module.compute_dtype = torch.bfloat16
    assert computed_in(module, torch.randn(8, IN)) == torch.float32
    x = torch.randn(8, IN).half()
    assert torch.equal(module(x), module(x.bfloat16()).half())
    module.set_compute_type(torch.randn(1, IN))
    assert module.compute_dtype == torch.float32


def test_the_bias_is_added_in_the_compute_dtype():
    module = LinearNF4(IN, OUT, compute_dtype=torch.bfloat16).to("cpu")
    x = torch.randn(8, IN).bfloat16()
    weight = functional.dequantize_4bit(module.weight.data, module.quant_state)
    bias = module.bias.bfloat16()
    assert_product(module(x), oracle.product(as_numpy(x), as_numpy(weight), as_numpy(bias)), "y")
    module(x).sum().backward()
    assert module.bias.grad.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_entries(nested, storage):
    module = LinearNF4(IN, OUT, compress_statistics=nested, quant_storage=storage).half().to("cpu")
    saved = {name: (value.dtype, tuple(value.shape)) for name, value in module.state_dict().items()}
    blocks, size = IN * OUT // 64, 1 if storage == torch.uint8 else 2
    state = saved.pop("weight.quant_state.bitsandbytes__nf4")
    assert state[0] == torch.uint8
    assert saved == {
        "weight": (storage, (IN * OUT // 2 // size, 1)),
        "bias": (torch.float16, (OUT,)),
        "weight.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        **({"weight.nested_absmax": (torch.float32, (1,)), "weight.nested_quant_map": (torch.float32, (256,))} if nested else {}),
    }
    text = json.loads(bytes(module.state_dict()["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert (text["dtype"], text["shape"], text["blocksize"]) == ("float16", [OUT, IN], 64)


def test_settings_come_from_the_checkpoint():
    source = Linear4bit(IN, OUT, quant_type="fp4", compress_statistics=False, quant_storage=torch.float16)
    source.weight.blocksize = 256
    source.to("cpu")
    module = Linear4bit(IN, OUT, quant_type="nf4")
    module.load_state_dict(source.state_dict())
    assert module.weight.__dict__ == {**source.weight.__dict__, "module": module}
    x = torch.randn(3, IN)
    assert torch.equal(module(x), source(x))


@pytest.mark.parametrize("damage", ["absmax-shape", "absmax-dtype", "map", "json", "bytes", "type", "nested-missing-in-json"])
@pytest.mark.parametrize("quantized", [False, True], ids=["fresh", "quantized"])
def test_damaged_checkpoints(damage, quantized):
    saved = {f"block.proj.{name}": value for name, value in LinearNF4(IN, OUT).to("cpu").state_dict().items()}
    weight = "block.proj.weight"
    packed = f"{weight}.quant_state.bitsandbytes__nf4"
    text = json.loads(bytes(saved[packed].tolist()))
    if damage == "absmax-shape":
        saved[f"{weight}.absmax"] = saved[f"{weight}.absmax"][:-1]
    elif damage == "absmax-dtype":
        saved[f"{weight}.absmax"] = saved[f"{weight}.absmax"].float()
    elif damage == "map":
        saved[f"{weight}.quant_map"] = saved[f"{weight}.quant_map"][:8]
    elif damage == "json":
        saved[packed] = saved[packed][:-5]
    elif damage == "bytes":
        saved[weight] = saved[weight][:-1]
    elif damage == "type":
        saved[packed.replace("nf4", "xf4")] = saved.pop(packed)
    else:
        del text["nested_offset"]
        saved[packed] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
    module = LinearNF4(IN, OUT)
    if quantized:
        module.to("cpu")
    model = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"proj": module})})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"block\.proj\.weight"):
        model.load_state_dict(saved)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_two_types_in_one_checkpoint():
    saved = LinearNF4(IN, OUT).to("cpu").state_dict()
    saved.update({k: v for k, v in LinearFP4(IN, OUT).to("cpu").state_dict().items() if "bitsandbytes__fp4" in k})
    with pytest.raises(CheckpointError, match=r"several quant types"):
        LinearNF4(IN, OUT).load_state_dict(saved)


@pytest.mark.parametrize("slot", ["setattr", "_parameters"])
def test_from_prequantized_parameters_serve_in_a_module_that_does_not_know_them(slot):
    source = LinearNF4(IN, OUT, bias=False).to("cpu")
    weight = Params4bit.from_prequantized(source.weight.data, source.quant_state.as_dict(packed=True), device="cpu")
    module = LinearNF4(IN, OUT, bias=False, device="meta")
    if slot == "setattr":
        module.weight = weight
    else:
        module._parameters["weight"] = weight
    x = torch.randn(3, IN)
    assert torch.equal(module(x), source(x))
    assert list(module.state_dict()) == list(source.state_dict())


def test_an_unquantized_parameter_takes_the_statistics_away():
    module = LinearNF4(IN, OUT).to("cpu")
    values = torch.randn(OUT, IN)
    module.weight = Params4bit(values, quant_type="nf4")
    assert module.quant_state is None
    with pytest.raises(BnbError, match=r"not quantized"):
        module(torch.randn(2, IN))
    module.to("cpu")
    assert torch.equal(module.weight.data, functional.quantize_nf4(values)[0])
    assert module.quant_state is module.weight.quant_state


@pytest.mark.parametrize("bias", [False, True])
def test_weight_that_is_no_parameter_any_more(bias):
    """As sharding leaves it: an attribute in place of the parameter."""
    module = LinearNF4(64, 32, bias=bias).to("cpu")
    x = torch.randn(2, 64)
    expected = module(x)
    for name in ("weight", "bias"):
        value = getattr(module, name)
        delattr(module, name)
        setattr(module, name, None if value is None else value.data)
    assert torch.equal(module(x), expected)
