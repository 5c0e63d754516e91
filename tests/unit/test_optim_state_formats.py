"""States in memory: made, moved and put in another order together with their parameter."""

import pytest
import torch

from bnb_core import optim
from bnb_core.ops import dequantize_blockwise
from bnb_core.optim.state_formats import FORMATS, Slot, format_of


def values_of(state, number=1):
    """Return what the codes stand for, in the shape of the parameter."""
    codes = state[f"state{number}"]
    flat = codes.as_strided((codes.numel(),), (1,))
    values = dequantize_blockwise(flat, state[f"absmax{number}"], state[f"qmap{number}"], 256, torch.float32)
    return values.as_strided(codes.shape, codes.stride())


@pytest.mark.parametrize("bits", [32, 8])
def test_states_follow_their_parameter_into_another_memory_format(bits):
    model = torch.nn.Conv2d(16, 32, 3)
    optimizer = optim.AdEMAMix(model.parameters(), optim_bits=bits, min_8bit_size=0)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    state = optimizer.state[model.weight]
    if bits == 8:
        halves = [{"state1": state["state1"][i], "absmax1": state["absmax1"][i], "qmap1": state["qmap1"]} for i in (0, 1)]
        before = [values_of(half).clone() for half in halves] + [values_of(state, 2).clone()]
    else:
        before = [*state["state1"].clone(), state["state2"].clone()]

    model.to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    format, slots = FORMATS[bits], optim.AdEMAMix.slots
    for slot in slots:
        format.follow(state, slot, model.weight)
    for slot, expected in zip(slots, (before[0], before[2], before[1])):
        assert slot.of(state, "state").stride() == model.weight.stride()
        if bits == 32:
            assert torch.equal(slot.of(state, "state"), expected)
        else:
            part = {f"{name}{slot.number}": slot.of(state, name) for name in ("state", "absmax")}
            part[f"qmap{slot.number}"] = state[f"qmap{slot.number}"]
            # Quantized again with other neighbours: within half a gap of the codebook, 1/64 of the block's largest value.
            assert (values_of(part, slot.number) - expected).abs().max() <= expected.abs().max() / 64


def test_training_goes_on_after_a_change_of_memory_format():
    model = torch.nn.Conv2d(16, 32, 3)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        model.to(memory_format=memory_format)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 16, 3, 3)).square().sum().backward()
            optimizer.step()
        assert optimizer.state[model.weight]["state1"].stride() == model.weight.stride()
    assert int(optimizer.state[model.weight]["step"]) == 6


def test_states_of_a_slice_are_dense():
    param = torch.nn.Parameter(torch.randn(60, 100)[:, :80])
    optimizer = optim.Adam8bit([param])
    twin = torch.nn.Parameter(param.detach().contiguous())
    other = optim.Adam8bit([twin])
    for _ in range(3):
        param.grad = torch.randn_like(param)
        twin.grad = param.grad.contiguous()
        optimizer.step()
        other.step()
    assert torch.equal(param, twin)
    assert optimizer.state[param]["state1"].is_contiguous()


def test_states_move_with_their_parameter():
    state = {}
    FORMATS[32].add(state, Slot(1), torch.zeros(3, 4), 0.0)
    FORMATS[32].follow(state, Slot(1), torch.zeros(3, 4, device="meta"))
    assert state["state1"].device.type == "meta"


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_initial_values(bits, initial):
    state = {}
    param = torch.zeros(600)
    FORMATS[bits].add(state, Slot(1), param, initial)
    values = state["state1"] if bits == 32 else values_of(state)
    assert torch.equal(values.abs(), torch.full((600,), initial))
    assert format_of(state) is FORMATS[bits]


def test_format_of_a_state_without_tensors():
    assert format_of({"step": 3}) is None


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.Lion8bit, optim.AdEMAMix8bit])
def test_8bit_states_take_a_byte_an_element_and_a_sixty_fourth(cls):
    param = torch.nn.Parameter(torch.randn(1 << 16))
    param.grad = torch.randn(1 << 16)
    optimizer = cls([param])
    optimizer.step()
    tensors = [value for key, value in optimizer.state[param].items() if key.startswith(("state", "absmax"))]
    states = {"AdamW8bit": 2, "Lion8bit": 1, "AdEMAMix8bit": 3}[cls.__name__]
    assert sum(t.numel() * t.element_size() for t in tensors) == states * (1 << 16) * (1 + 4 / 256)
