"""Parameters of any module that are stored in 4 bits: values, reads in a forward, state dicts, moving."""

import copy
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bnb_core import functional
from bnb_core.errors import BnbError, CheckpointError, InvalidArgumentError, MissingParameterError, ParameterTypeError
from bnb_core.nn import parametrize
from bnb_core.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit, replace_parameter_4bit_prequantized

keeps = pytest.mark.skipif(not parametrize._CAN_KEEP, reason="this torch calls no hook after a forward that raised")
CONVOLUTIONS = {
    "conv1d": (torch.nn.Conv1d, (9,)),
    "conv2d": (torch.nn.Conv2d, (7, 8)),
    "conv3d": (torch.nn.Conv3d, (5, 4, 5)),
    "transposed": (torch.nn.ConvTranspose2d, (4, 5)),
}
every_convolution = pytest.mark.parametrize(("kind", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
SETTINGS = [("nf4", False, 64), ("nf4", True, 64), ("fp4", False, 32), ("fp4", True, 128)]


class Experts(torch.nn.Module):
    """Experts as transformers has them: one parameter for all, read several times."""

    def __init__(self, experts=3, features=10, hidden=12):
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(experts, features, hidden))
        self.down = torch.nn.Parameter(torch.randn(experts, hidden, features))
        self.note = torch.zeros(3)

    def forward(self, x, then=None):
        y = torch.stack([torch.relu(x @ self.up[expert]) @ self.down[expert] for expert in range(len(self.up))]).sum(0)
        if then is not None:
            then()
        return y


def quantized(module, *names, **kwargs):
    for name in names or ("weight",):
        replace_parameter_4bit(module, name, **kwargs)
    return module


def expected(values, **kwargs):
    return functional.dequantize_4bit(*functional.quantize_4bit(values, **{"quant_type": "nf4", **kwargs}))


@pytest.fixture
def dequantized(monkeypatch):
    """The shapes of what is dequantized, in order."""
    shapes = []

    def dequantize(packed, state):
        shapes.append(tuple(state.shape))
        return functional.dequantize_4bit(packed, state)

    monkeypatch.setattr(parametrize, "dequantize_4bit", dequantize)
    return shapes


# --------------------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("quant_type", "nested", "blocksize"), SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (33,), (7, 9), (3, 5, 7), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_those_of_the_codes(shape, dtype, quant_type, nested, blocksize):
    module = torch.nn.Module()
    module.table = torch.nn.Parameter(torch.randn(shape).to(dtype))
    values = module.table.data.clone()
    replace_parameter_4bit(module, "table", nested, quant_type, blocksize)
    assert module.table.dtype == dtype
    wanted = expected(values, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize)
    assert torch.equal(module.table, wanted)
    assert not module.table.requires_grad
    assert [tuple(p.shape) for p in module.parameters()] == [((values.numel() + 1) // 2, 1)]


@every_convolution
def test_convolutions_are_those_with_the_dequantized_weight(kind, size):
    module = kind(4, 6, 3, padding=1)
    twin = copy.deepcopy(module)
    twin.weight.data = expected(module.weight.data)
    quantized(module)
    x = torch.randn(2, 4, *size)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((module, twin), inputs)]
    assert torch.equal(*outputs)
    g = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(g)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(module.bias.grad, twin.bias.grad)


@every_convolution
def test_layers_around_a_quantized_convolution_are_trained(kind, size):
    frozen = quantized(kind(4, 4, 3, padding=1))
    x, target = torch.randn(8, 2, *size), torch.randn(8, 1)
    layers = torch.nn.Sequential(kind(2, 4, 1), frozen, torch.nn.Flatten())
    model = torch.nn.Sequential(layers, torch.nn.Linear(layers(x).shape[1], 1))
    before = frozen.weight.clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(frozen.weight, before)


def test_experts():
    module = Experts()
    twin = copy.deepcopy(module)
    twin.up.data, twin.down.data = expected(module.up.data), expected(module.down.data)
    quantized(module, "up", "down")
    x = torch.randn(5, 10, requires_grad=True)
    assert torch.equal(module(x), twin(x))
    module(x).sum().backward()
    (grad,) = torch.autograd.grad(twin(x).sum(), x)
    assert torch.equal(x.grad, grad)


def test_prequantized_codes_in_any_dtype():
    values = torch.randn(8, 16)
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        packed, state = functional.quantize_4bit(values, quant_type="fp4", quant_storage=storage)
        module = torch.nn.Linear(16, 8)
        module.weight = torch.nn.Parameter(packed, requires_grad=False)
        statistics = state.as_dict(packed=True)
        replace_parameter_4bit_prequantized(module, "weight", statistics, torch.device("cpu"))
        assert torch.equal(module.weight, functional.dequantize_4bit(packed, state))
        assert torch.equal(module.half().weight, functional.dequantize_4bit(packed, state).half())
        assert statistics.keys() == state.as_dict(packed=True).keys()


# --------------------------------------------------------------------------------------------------------------------------- errors


def test_wrong_names_and_values():
    module = Experts()
    for replace in (replace_parameter_4bit, lambda m, n: replace_parameter_4bit_prequantized(m, n, {}, "cpu")):
        with pytest.raises(MissingParameterError, match=r"Experts.*'left'.*up, down"):
            replace(module, "left")
        with pytest.raises(ParameterTypeError, match=r"'note'.*Tensor"):
            replace(module, "note")
    assert issubclass(MissingParameterError, AttributeError)
    assert issubclass(ParameterTypeError, TypeError)
    with pytest.raises(InvalidArgumentError, match="'nf5'"):
        replace_parameter_4bit(module, "up", quant_type="nf5")
    with pytest.raises(InvalidArgumentError, match="48"):
        replace_parameter_4bit(module, "up", blocksize=48)
    quantized(module, "up")
    with pytest.raises(ParameterTypeError, match=r"'up'.*already"):
        replace_parameter_4bit(module, "up")


def test_statistics_of_another_parameter():
    packed, _ = functional.quantize_4bit(torch.randn(8, 16))
    _, state = functional.quantize_4bit(torch.randn(8, 32))
    module = torch.nn.Linear(16, 8)
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(CheckpointError, match=r"64 bytes.*\[8, 32\]"):
        replace_parameter_4bit_prequantized(module, "weight", state.as_dict(packed=True), "cpu")


# --------------------------------------------------------------------------------------------------------------- reads in a forward


@keeps
def test_a_forward_dequantizes_once(dequantized):
    module = quantized(Experts(), "up", "down")
    for calls in (1, 2):
        module(torch.randn(2, 10))
        assert dequantized == [(3, 10, 12), (3, 12, 10)] * calls
    assert nothing_is_kept(module)


def test_other_reads_keep_nothing(dequantized):
    module = quantized(Experts(), "up")
    assert module.up is not module.up
    assert len(dequantized) == 2
    assert nothing_is_kept(module)


@keeps
def test_nothing_is_kept_after_an_error(dequantized):
    module = quantized(Experts(), "up")

    def fail():
        raise KeyError("stop")

    with pytest.raises(KeyError):
        module(torch.randn(2, 10), fail)
    assert nothing_is_kept(module)
    module.register_forward_pre_hook(lambda *_: fail(), prepend=True)
    with pytest.raises(KeyError):
        module(torch.randn(2, 10))
    assert nothing_is_kept(module)
    assert len(module.up) == 3
    assert nothing_is_kept(module)


@keeps
def test_a_forward_within_a_forward(dequantized):
    module = quantized(Experts(), "up")
    x = torch.randn(2, 10)
    module(x, lambda: module(x, lambda: module.up))
    assert dequantized == [(3, 10, 12)]
    assert nothing_is_kept(module)


@keeps
def test_checkpointing_keeps_nothing():
    module = quantized(Experts(), "up", "down")
    x = torch.randn(2, 10, requires_grad=True)
    wanted = torch.autograd.grad(module(x).sum(), x)[0]
    checkpoint(module, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, wanted)
    assert nothing_is_kept(module)


@keeps
def test_threads_do_not_share_what_is_kept():
    module = quantized(Experts(), "up", "down")
    x, results, barrier = torch.randn(2, 10), [], threading.Barrier(4)
    wanted = module(x)

    def work():
        for _ in range(10):
            results.append(torch.equal(module(x, barrier.wait), wanted))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40
    assert nothing_is_kept(module)


def nothing_is_kept(module):
    found = [item for item in module.modules() if isinstance(item, Bnb4bitParametrization)]
    return found and not any(item._kept or item._forwards for item in found)


# ---------------------------------------------------------------------------------------------------------------------- state dicts


def bits(module):
    return {
        name: (v.dtype, v.shape, bytes(v.detach().reshape(-1).view(torch.uint8).tolist()))
        for name, v in module.state_dict().items()
    }


@pytest.mark.parametrize(("quant_type", "nested", "blocksize"), SETTINGS, ids=str)
def test_state_dicts_load_strictly(quant_type, nested, blocksize):
    settings = {"quant_type": quant_type, "compress_statistics": nested, "blocksize": blocksize}
    source = torch.nn.Sequential(torch.nn.Linear(10, 10), quantized(Experts(), "up", "down", **settings))
    target = torch.nn.Sequential(torch.nn.Linear(10, 10), quantized(Experts(), "up", "down"))
    saved = copy.deepcopy(source.state_dict())
    result = target.load_state_dict(saved)
    assert not any(result)
    assert bits(target) == bits(source)
    x = torch.randn(4, 10)
    assert torch.equal(target(x), source(x))
    saved["1.up"].zero_()
    saved["1.up.absmax"].zero_()
    assert bits(target) == bits(source)


def test_entries():
    names = list(quantized(Experts(), "up", compress_statistics=True).state_dict())
    assert names[0] == "down"
    assert names[1:] == [
        *("up", "up.absmax", "up.quant_map", "up.nested_absmax", "up.nested_quant_map"),
        "up.quant_state.bitsandbytes__nf4",
    ]


def test_values_load_into_a_quantized_parameter():
    source = Experts()
    target = quantized(Experts(), "up", quant_type="fp4", blocksize=32).half()
    target.load_state_dict(source.state_dict())
    wanted = expected(source.up.data, quant_type="fp4", blocksize=32)
    assert target.up.dtype == torch.float16
    assert torch.equal(target.up, wanted.half())


def assigns_codes():
    module = torch.nn.Module()
    module.codes = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    try:
        module.load_state_dict(module.state_dict(), assign=True)
    except (TypeError, RuntimeError):  # before 2.1 it cannot; 2.1 makes a parameter that requires a gradient
        return False
    return True


@pytest.mark.skipif(not assigns_codes(), reason="load_state_dict cannot assign what has no gradient")
def test_assigned_state_dicts():
    source = quantized(Experts(), "up", "down").bfloat16()
    target = quantized(Experts().to("meta"), "up", "down")
    assert target.up.is_meta
    saved = source.state_dict()
    target.load_state_dict(saved, assign=True)
    assert target.parametrizations["up"].original.data_ptr() == saved["up"].data_ptr()
    assert target.up.dtype == torch.bfloat16
    x = torch.randn(2, 10).bfloat16()
    assert torch.equal(target(x), source(x))


def test_a_module_on_meta_comes_to_the_checkpoint():
    source, target = quantized(Experts(), "up", "down"), quantized(Experts().to("meta"), "up", "down")
    target.load_state_dict(source.state_dict())
    assert bits(target) == bits(source)


def test_wrong_state_dicts_change_nothing():
    module = quantized(Experts(), "up", "down")
    before = bits(module)
    saved = quantized(Experts(), "up", "down").state_dict()
    damaged = {
        r"Missing.*\"up\.absmax\"": {name: value for name, value in saved.items() if name != "up.absmax"},
        r"Missing.*\"up\.quant_state.bitsandbytes__nf4\"": {n: value for n, value in saved.items() if "up.quant_state" not in n},
        r"up: quantized state: unknown entry": {**saved, "up.speed": torch.ones(1)},
        r"up: the packed weight has 9 bytes": {**saved, "up": saved["up"][:9]},
        r"size mismatch for up.*\[2, 10, 12\].*\[3, 10, 12\]": quantized(Experts(2), "up", "down").state_dict(),
        r"size mismatch for up.*\[4, 10, 12\].*\[3, 10, 12\]": Experts(4).state_dict(),
    }
    for message, entries in damaged.items():
        entries = {name: value for name, value in entries.items() if name.startswith("up")}
        rest = {name: value for name, value in module.state_dict().items() if name.startswith("down")}
        with pytest.raises((RuntimeError, BnbError), match=message):
            module.load_state_dict({**entries, **rest})
        assert bits(module) == before


# --------------------------------------------------------------------------------------------------------------- moving and copying


def test_casts_leave_the_codes_alone_and_change_what_is_read():
    module = quantized(torch.nn.Conv1d(4, 6, 3))
    codes, values = module.state_dict()["weight"].clone(), module.weight
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        module.to(dtype)
        assert torch.equal(module.weight, values.to(dtype))
        assert torch.equal(module.state_dict()["weight"], codes)
    assert torch.equal(module.double().weight, values.double())
    assert module(torch.randn(1, 4, 5).double()).dtype == torch.float64
    assert not any(quantized(torch.nn.Conv1d(4, 6, 3)).load_state_dict(module.state_dict()))
    assert module.bfloat16()(torch.randn(1, 4, 5).bfloat16()).dtype == torch.bfloat16


def test_statistics_move_with_the_module():
    module = quantized(Experts(), "up", compress_statistics=True).to("meta")
    state = module.parametrizations["up"][0].quant_state
    assert {state.absmax.device.type, state.code.device.type, state.offset.device.type, state.state2.absmax.device.type} == {"meta"}
    assert module.up.is_meta


def test_copies_are_equal_and_independent():
    ordinary = torch.nn.utils.parametrize.register_parametrization(torch.nn.Linear(2, 2), "weight", torch.nn.Identity())
    try:
        copy.deepcopy(ordinary)
    except RuntimeError:
        pytest.skip("this torch copies no parametrized module")
    module = quantized(Experts(), "up", "down")
    before, twin = bits(module), copy.deepcopy(module)
    assert bits(twin) == before
    twin.load_state_dict(quantized(Experts(), "up", "down").state_dict())
    assert bits(twin) != before
    assert bits(module) == before
    twin(torch.randn(1, 10))
    assert nothing_is_kept(twin)
