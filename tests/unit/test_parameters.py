"""Params4bit and Int8Params by themselves: what other libraries do with them outside our modules."""

import copy
import gc
import io
import pickle

import pytest
import torch

from bnb_core import functional
from bnb_core.errors import CheckpointError, InvalidArgumentError
from bnb_core.nn import Int8Params, Linear4bit, Params4bit

ATTRIBUTES = {"blocksize", "bnb_quantized", "compress_statistics", "module", "quant_state", "quant_storage", "quant_type"}


def quantized_4bit(storage=torch.uint8, **settings):
    return Params4bit(torch.randn(16, 32), quant_type="nf4", quant_storage=storage, **settings).to("cpu")


def quantized_int8():
    return Int8Params(torch.randn(16, 32), requires_grad=False).to("cpu")


def same_bits(a, b):
    """Compare tensors that may be codes stored as floating-point numbers, NaN among them."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def values_of(parameter):
    if isinstance(parameter, Params4bit):
        return functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return functional.int8_vectorwise_dequant(parameter.data, parameter.SCB)


MAKERS = {
    "4bit": quantized_4bit,
    "4bit-nested": lambda: quantized_4bit(compress_statistics=True),
    "4bit-bfloat16": lambda: quantized_4bit(torch.bfloat16),
    "int8": quantized_int8,
}
quantized = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# ---------------------------------------------------------------------------------------------------------------------- attributes


def test_attributes_are_the_contract():
    data = torch.randn(8, 8)
    assert set(Params4bit(data).__dict__) == ATTRIBUTES
    assert set(Int8Params(data).__dict__) == {"CB", "SCB", "has_fp16_weights"}
    assert set(quantized_4bit().__dict__) == ATTRIBUTES
    assert set(quantized_int8().__dict__) == {"CB", "SCB", "has_fp16_weights"}


def test_defaults():
    parameter = Params4bit(torch.randn(8, 8))
    assert (parameter.blocksize, parameter.compress_statistics, parameter.quant_type) == (64, True, "fp4")
    assert (parameter.quant_storage, parameter.bnb_quantized, parameter.requires_grad) == (torch.uint8, False, False)
    assert Int8Params(torch.randn(8, 8)).requires_grad
    assert Params4bit().numel() == Int8Params().numel() == 0


def test_rebuilt_from_its_attributes():
    old = Params4bit(torch.empty(16, 32, device="meta"), quant_type="nf4", blocksize=32, compress_statistics=False)
    old._is_hf_initialized = True
    new = Params4bit(torch.randn(16, 32), requires_grad=False, **old.__dict__).to("cpu")
    assert new.bnb_quantized
    assert (new.quant_state.blocksize, new.quant_state.quant_type, new.quant_state.nested) == (32, "nf4", False)
    assert new._is_hf_initialized


def test_quantized_again_from_new_values():
    old = quantized_4bit()
    attributes = {name: value for name, value in old.__dict__.items() if name != "bnb_quantized"}
    values = torch.randn(16, 32)
    new = Params4bit(values, requires_grad=False, bnb_quantized=False, **attributes).to("cpu")
    expected = Params4bit(values, quant_type="nf4").to("cpu")
    assert torch.equal(new.data, expected.data)
    assert torch.equal(new.quant_state.absmax, expected.quant_state.absmax)


def test_int8_codes_do_not_outlive_their_parameter():
    old = quantized_int8()
    new = Int8Params(torch.randn(4, 4), requires_grad=False, **old.__dict__)
    assert new.CB is None
    codes = torch.ones(4, 4, dtype=torch.int8)
    assert Int8Params(codes, requires_grad=False, **old.__dict__).CB.data_ptr() == codes.data_ptr()


def test_names_of_a_checkpoint_resolve_as_attributes():
    parameter = quantized_4bit(compress_statistics=True)
    state = parameter.quant_state
    assert parameter.absmax is state.absmax
    assert parameter.quant_map is parameter.code is state.code
    assert parameter.nested_absmax is state.state2.absmax
    assert parameter.nested_quant_map is state.state2.code
    assert parameter.nested_offset is parameter.offset is state.offset
    assert parameter.state2 is state.state2
    assert (parameter.nested_blocksize, parameter.nested_dtype) == (256, torch.float32)
    assert parameter.quant_state.bitsandbytes__nf4.dtype == torch.uint8


@pytest.mark.parametrize("name", ["absmax", "code", "offset", "state2", "nested_absmax", "nested_offset", "no_such_thing"])
def test_no_statistics_before_quantization(name):
    assert not hasattr(Params4bit(torch.randn(8, 8)), name)


def test_no_nested_statistics_of_plain_scales():
    assert not hasattr(quantized_4bit(compress_statistics=False), "nested_absmax")


# -------------------------------------------------------------------------------------------------------------------------- moving


@pytest.mark.parametrize(
    "move", [lambda p: p.to("cpu"), lambda p: p.cpu(), lambda p: p.to(torch.zeros(()))], ids=["to", "cpu", "like"]
)
@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_a_device_quantizes(cls, move):
    parameter = cls(torch.randn(16, 32), requires_grad=False)
    assert move(parameter) is parameter
    assert parameter.dtype == (torch.uint8 if cls is Params4bit else torch.int8)
    codes = parameter.data.clone()
    assert torch.equal(move(parameter).data, codes)


@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_neither_a_dtype_nor_meta_quantizes(cls):
    values = torch.randn(16, 32)
    parameter = cls(values, requires_grad=False)
    cast = parameter.to(torch.bfloat16)
    assert type(cast) is cls
    assert torch.equal(cast.data, values.bfloat16())
    assert parameter.to(torch.float32) is parameter
    on_meta = parameter.to("meta")
    assert type(on_meta) is cls
    assert on_meta.is_meta
    assert on_meta.dtype == torch.float32


def test_the_dtype_given_with_a_device_is_what_the_codes_stand_for():
    values = torch.randn(16, 32)
    parameter = Params4bit(values, quant_type="nf4").to("cpu", torch.bfloat16)
    assert parameter.quant_state.dtype == torch.bfloat16
    assert torch.equal(parameter.data, Params4bit(values, quant_type="nf4").to("cpu").data)  # no value was rounded twice


def test_floating_point_weights_stay_so():
    values = torch.randn(16, 32)
    parameter = Int8Params(values, has_fp16_weights=True)
    moved = parameter.to("cpu", torch.float16)
    assert moved.dtype == torch.float16
    moved.float().sum().backward()  # an ordinary cast, with a gradient
    assert torch.equal(parameter.grad, torch.ones(16, 32))
    with torch.no_grad():
        assert type(parameter.to(torch.float16)) is Int8Params


@quantized
def test_moving_makes_a_copy_and_leaves_the_original(make):
    parameter = make()
    before = values_of(parameter)
    moved = parameter.to("meta")
    assert type(moved) is type(parameter)
    assert moved.is_meta
    assert (moved.quant_state.absmax if isinstance(moved, Params4bit) else moved.SCB).is_meta
    assert torch.equal(values_of(parameter), before)


@quantized
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_of_a_container_leave_codes_alone(make, cast):
    parameter = make()
    before, codes = values_of(parameter), parameter.data.clone()
    container = torch.nn.ParameterList([parameter])
    getattr(container, cast)()
    assert same_bits(container[0].data, codes)
    assert torch.equal(values_of(container[0]), before)


@quantized
def test_dtypes_given_to_a_container_leave_codes_alone(make):
    parameter = make()
    before = values_of(parameter)
    container = torch.nn.ParameterList([parameter]).to(torch.float16).to("cpu", torch.bfloat16)
    assert torch.equal(values_of(container[0]), before)


@quantized
def test_data_that_are_assigned_bring_their_statistics(make):
    """What torch.nn.Module does with the result of `parameter.to(device)`."""
    old, new = make(), make()
    old.data = new
    assert torch.equal(values_of(old), values_of(new))
    if isinstance(old, Int8Params):
        assert old.CB.data_ptr() == old.data_ptr()


def test_assigned_data_do_not_bring_their_module():
    module = Linear4bit(32, 16).to("cpu")
    module.weight.data = quantized_4bit()
    assert module.weight.module is module


def test_quantizing_freezes():
    assert not Params4bit(torch.randn(8, 8), requires_grad=True).to("cpu").requires_grad
    assert not Params4bit(torch.randn(8, 8), requires_grad=True, quant_storage=torch.float32).to("cpu").requires_grad
    assert not Int8Params(torch.randn(8, 8), requires_grad=True).to("cpu").requires_grad


def test_quantization_refuses_what_it_cannot_do():
    with pytest.raises(InvalidArgumentError, match=r"'nf5'.*'nf4'"):
        Params4bit(torch.randn(8, 8), quant_type="nf5").to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"blocksize is 48"):
        Params4bit(torch.randn(8, 8), blocksize=48).to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"float64"):
        Params4bit(torch.randn(8, 8, dtype=torch.float64)).to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"quant_storage"):
        Params4bit(torch.randn(3, 3), quant_storage=torch.float32).to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"float64"):
        Int8Params(torch.randn(8, 8, dtype=torch.float64)).to("cpu")


def test_a_refused_quantization_changes_nothing():
    parameter = Params4bit(torch.randn(8, 8), requires_grad=True, blocksize=48)
    before = parameter.data.clone()
    with pytest.raises(InvalidArgumentError):
        parameter.to("cpu")
    assert parameter.requires_grad
    assert not parameter.bnb_quantized
    assert torch.equal(parameter.data, before)


# ---------------------------------------------------------------------------------------------------------------- copies and parts


def through_pickle(parameter):
    return pickle.loads(pickle.dumps(parameter))


def through_torch_save(parameter):
    file = io.BytesIO()
    torch.save(parameter, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=False)
    except TypeError:  # older torch knows no other way
        file.seek(0)
        return torch.load(file)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": through_pickle, "save": through_torch_save}


@quantized
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies(make, duplicate):
    parameter = make()
    result = duplicate(parameter)
    assert type(result) is type(parameter)
    assert set(result.__dict__) == set(parameter.__dict__)
    assert same_bits(result.data, parameter.data)
    assert torch.equal(values_of(result), values_of(parameter))
    assert (result.data_ptr() == parameter.data_ptr()) == (duplicate is copy.copy)
    if isinstance(result, Int8Params):
        assert result.CB.data_ptr() == result.data_ptr()


def test_a_copied_parameter_does_not_reach_into_the_module_of_the_original():
    module = Linear4bit(32, 16)
    lone = copy.deepcopy(module.weight).to("cpu")
    assert lone.bnb_quantized
    assert module.quant_state is None
    assert not module.weight.bnb_quantized


@pytest.mark.parametrize(
    "divide",
    [lambda p: torch.chunk(p, 2), lambda p: torch.split(p, 64), lambda p: p.chunk(2), lambda p: p.split([64, 64])],
    ids=["torch.chunk", "torch.split", "chunk", "split"],
)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_parts_are_parameters_with_the_same_attributes(divide, storage):
    parameter = Params4bit(torch.randn(16, 16 if storage == torch.uint8 else 32), quant_storage=storage).to("cpu")
    parts = divide(parameter)
    assert isinstance(parts, tuple)
    assert same_bits(torch.cat([part.data for part in parts]), parameter.data)
    for part in parts:
        assert type(part) is Params4bit
        assert part.__dict__ == parameter.__dict__


def test_other_functions_return_ordinary_tensors():
    parameter = quantized_4bit()
    assert {type(parameter.detach()), type(parameter.clone()), type(parameter[:3]), type(parameter.data)} == {torch.Tensor}
    assert type(quantized_int8().data) is torch.Tensor


# --------------------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16], ids=str)
def test_from_prequantized(nested, storage):
    source = quantized_4bit(storage, compress_statistics=nested, blocksize=128)
    saved = {f"layers.0.weight.{name}": value for name, value in source.quant_state.as_dict(packed=True).items()}
    module = Linear4bit(32, 16)
    result = Params4bit.from_prequantized(source.data, saved, device="cpu", module=module, quant_type="fp4", note="kept")
    assert torch.equal(values_of(result), values_of(source))
    assert (result.blocksize, result.compress_statistics, result.quant_type) == (128, nested, "nf4")
    assert (result.quant_storage, result.bnb_quantized, result.requires_grad) == (storage, True, False)
    assert module.quant_state is result.quant_state
    assert result.module is module
    assert result.note == "kept"


def test_from_prequantized_refuses_codes_of_another_tensor():
    state = quantized_4bit().quant_state
    with pytest.raises(CheckpointError, match=r"100 bytes.*\[16, 32\].*256"):
        Params4bit.from_prequantized(torch.zeros(100, 1, dtype=torch.uint8), state.as_dict(packed=True), device="cpu")


# -------------------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("cls", [Params4bit, Int8Params])
def test_no_floating_point_copy_survives(cls):
    shape = (123, 78)

    def copies():
        gc.collect()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum(t.is_floating_point() and t.numel() == shape[0] * shape[1] for t in tensors)

    parameter = cls(torch.randn(shape), requires_grad=False)
    assert copies() > 0
    parameter.to("cpu")
    assert copies() == 0
    assert parameter.data.element_size() * parameter.numel() == shape[0] * shape[1] // (2 if cls is Params4bit else 1)
