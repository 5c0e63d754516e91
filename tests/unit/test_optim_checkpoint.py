"""Saving and loading optimizers."""

import copy
import io

import pytest
import torch

from bnb_core import optim
from bnb_core.errors import CheckpointError
from bnb_core.optim.checkpoint import WRAPPER

EVERY_CLASS = [cls for cls in vars(optim).values() if isinstance(cls, type) and issubclass(cls, optim.Optimizer)]
EVERY_CLASS.remove(optim.Optimizer)


def create(cls, params, **options):
    if issubclass(cls, (optim.SGD, optim.LARS)):
        options = {"lr": 0.1, "momentum": 0.9, **options}
    return cls(params, **options)


def make_params(dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((90, 60), (17,))]


def train(optimizer, params, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("cls", EVERY_CLASS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_continues_as_if_nothing_had_happened(cls, dtype):
    params = make_params(dtype)
    optimizer = create(cls, params, lr=0.01)
    train(optimizer, params, 4, seed=1)
    saved = through_a_file({"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    train(optimizer, params, 3, seed=2)

    resumed = [torch.nn.Parameter(p) for p in saved["model"]]
    other = create(cls, resumed, lr=0.5)
    other.load_state_dict(saved["optimizer"])
    train(other, resumed, 3, seed=2)
    for param, expected in zip(resumed, params):
        assert torch.equal(param, expected)
    for param, expected in zip(resumed, params):
        for key, value in optimizer.state[expected].items():
            assert torch.equal(other.state[param][key], value), key
            assert other.state[param][key].dtype == value.dtype
    assert other.param_groups[0]["lr"] == 0.01


def test_form_of_a_checkpoint():
    params = make_params()
    optimizer = optim.AdEMAMix8bit(params)
    train(optimizer, params, 2, seed=0)
    saved = optimizer.state_dict()
    large, small = saved["state"][0], saved["state"][1]
    assert set(large) == set(small) == {"step", WRAPPER}
    assert (type(large["step"]), large["step"]) == (int, 2)
    shapes = {key: (value.dtype, tuple(value.shape)) for key, value in large[WRAPPER].items()}
    blocks = -(-90 * 60 // 256)
    assert shapes == {
        "state1": (torch.uint8, (2, 90, 60)),
        "state2": (torch.uint8, (90, 60)),
        "absmax1": (torch.float32, (2, blocks)),
        "absmax2": (torch.float32, (blocks,)),
        "qmap1": (torch.float32, (256,)),
        "qmap2": (torch.float32, (256,)),
    }
    assert {key: tuple(value.shape) for key, value in small[WRAPPER].items()} == {"state1": (2, 17), "state2": (17,)}
    assert "capturable" not in saved["param_groups"][0]


@pytest.mark.parametrize(
    ("cls", "betas"),
    [(optim.SGD, (0.9, 0.0)), (optim.RMSprop, (0.99, 0.0)), (optim.Adagrad, (0.0, 0.0)), (optim.Lion, (0.9, 0.99))],
)
def test_groups_have_what_bitsandbytes_reads(cls, betas):
    group = create(cls, make_params()).state_dict()["param_groups"][0]
    assert group["betas"] == betas
    assert {"lr", "eps", "weight_decay", "params"} <= set(group)


def test_groups_of_bitsandbytes_are_understood():
    params = make_params()
    optimizer = optim.SGD(params, lr=0.1, momentum=0.5, nesterov=True)
    group = {"lr": 0.3, "betas": (0.8, 0.0), "eps": 0.0, "weight_decay": 0.2, "capturable": True, "params": [0, 1]}
    optimizer.load_state_dict({"state": {}, "param_groups": [group]})
    loaded = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    expected = {"lr": 0.3, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.2, "nesterov": True, "capturable": False}
    assert loaded == expected


def test_both_forms_of_states_are_read():
    params = make_params()
    optimizer = optim.Adam8bit(params)
    train(optimizer, params, 2, seed=0)
    saved = optimizer.state_dict()
    flat = copy.deepcopy(saved)
    for state in flat["state"].values():
        state.update(state.pop(WRAPPER))
    for form in (saved, flat):
        other = optim.Adam8bit(params)
        other.load_state_dict(form)
        assert all(torch.equal(other.state[p]["state1"], optimizer.state[p]["state1"]) for p in params)


def test_checkpoint_is_neither_changed_nor_shared():
    params = make_params()
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 2, seed=0)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other = optim.AdamW8bit(params, lr=0.5)
    other.load_state_dict(saved)
    train(other, params, 2, seed=1)
    for index, state in kept["state"].items():
        assert saved["state"][index]["step"] == state["step"]
        assert all(torch.equal(saved["state"][index][WRAPPER][key], value) for key, value in state[WRAPPER].items())
    assert saved["param_groups"] == kept["param_groups"]


def test_steps_and_codebooks_are_shared_again():
    params = make_params() + make_params()
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 2, seed=0)
    other = optim.AdamW8bit(params)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert len({id(state["step"]) for state in other.state.values()}) == 1
    assert len({id(other.state[p]["qmap1"]) for p in params[::2]}) == 1


def test_steps_that_differ_stay_apart():
    params = make_params()
    optimizer = optim.Adam(params, capturable=True)
    train(optimizer, params, 1, seed=0)
    params[1].grad = None
    optimizer.step()
    other = optim.Adam(params)
    other.load_state_dict(optimizer.state_dict())
    assert [int(other.state[p]["step"]) for p in params] == [2, 1]


def test_capturable_is_that_of_the_optimizer_not_of_the_checkpoint():
    params = make_params()
    capturable, plain = optim.Adam(params, lr=0.25, capturable=True), optim.Adam(params, lr=0.5)
    train(capturable, params, 2, seed=0)
    train(plain, params, 2, seed=0)
    saved = [through_a_file(optimizer.state_dict()) for optimizer in (capturable, plain)]
    capturable.load_state_dict(saved[1])
    plain.load_state_dict(saved[0])
    assert plain.param_groups[0]["lr"] == 0.25
    assert isinstance(capturable.param_groups[0]["lr"], torch.Tensor)
    assert float(capturable.param_groups[0]["lr"]) == 0.5
    assert isinstance(saved[0]["param_groups"][0]["lr"], float)


def test_states_keep_the_format_they_were_saved_in():
    params = make_params()
    optimizer = optim.AdamW32bit(params)
    train(optimizer, params, 1, seed=0)
    other = optim.AdamW8bit(params)
    other.load_state_dict(optimizer.state_dict())
    train(other, params, 1, seed=0)
    assert other.state[params[0]]["state1"].dtype == torch.float32


def test_a_codebook_that_is_not_ours_is_kept():
    params = make_params() + make_params()
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 1, seed=0)
    saved = copy.deepcopy(optimizer.state_dict())
    codebook = torch.linspace(-1, 1, 256)
    for index in (0, 2):
        saved["state"][index][WRAPPER]["qmap1"] = codebook.clone()
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1, seed=0)
    kept = [optimizer.state[params[index]]["qmap1"] for index in (0, 2)]
    assert torch.equal(kept[0], codebook)
    assert kept[0] is kept[1]


def damaged(change):
    params = make_params()
    optimizer = optim.AdamW8bit(params)
    train(optimizer, params, 1, seed=0)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"])
    return optimizer, saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s[0][WRAPPER].pop("state2"),
            r"state2 is None; a parameter of shape \[90, 60\] with 8-bit states needs torch.uint8",
        ),
        (lambda s: s[0][WRAPPER].pop("absmax1"), r"absmax1 is None; .* needs torch.float32 \[22\]"),
        (lambda s: s[0][WRAPPER].update(qmap2=torch.zeros(16)), r"qmap2 is torch.float32 \[16\]"),
        (lambda s: s[0].update({WRAPPER: s[1][WRAPPER]}), r"state1 is torch.float32 \[17\]; a parameter of shape \[90, 60\]"),
        (lambda s: s[1].pop(WRAPPER), "state1 is None; .* with 32-bit states"),
        (lambda s: s[1].update(step="two"), "step is 'two'; it must be a number"),
    ],
)
def test_refuses_states_that_do_not_fit(change, message):
    optimizer, saved = damaged(change)
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(saved)


def test_refuses_other_numbers_of_parameters():
    optimizer = optim.Adam(make_params())
    saved = optim.Adam(make_params()[:1]).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"] * 2})
