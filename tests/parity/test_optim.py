"""bitsandbytes' optimizers: checkpoints that go both ways, and the same steps where it does what it says."""

import copy
import io

import pytest
import torch

from bnb_core import optim

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the bitsandbytes wheel is not installed")

THEIRS = {name: cls for name, cls in vars(bitsandbytes.optim).items() if isinstance(cls, type)}
OPTIMIZERS = [name for name, cls in THEIRS.items() if issubclass(cls, torch.optim.Optimizer) and name != "PytorchLARS"]


def options_of(name):
    options = {"lr": 1e-2}
    if name.startswith(("SGD", "LARS")):
        options["momentum"] = 0.9
    if not name.startswith(("Adam", "Paged")):
        options["weight_decay"] = 0.1
    return options


#: They raise, because their first state has half the size that the kernel takes.
BROKEN = {"AdEMAMix32bit", "PagedAdEMAMix32bit"}
interchanged = pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in BROKEN])


#: On the CPU, bitsandbytes takes the norm of an update without its bias correction (LAMB), or not at all (8-bit states).
OTHER_NORM = {"LAMB", "LAMB32bit", "LAMB8bit", "LARS8bit"}


def make(cls, name, values):
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = cls(params, **options_of(name))
    if name in OTHER_NORM:
        optimizer.args.max_unorm = 0.0
    return params, optimizer


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


def assert_same_step(params, others, before):
    """Both have moved from the same point, and hardly differently."""
    for param, other, start in zip(params, others, before):
        assert not torch.equal(param, start)
        step = (other.double() - start.double()).abs().max()
        precision = torch.finfo(param.dtype).eps * start.abs().max()
        assert (param.double() - other.double()).abs().max() <= 1e-4 * step + precision


@interchanged
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("direction", ["from bitsandbytes", "to bitsandbytes"])
def test_checkpoints_go_both_ways(name, dtype, direction):
    values = [torch.randn(90, 60).to(dtype), torch.randn(17).to(dtype)]
    ours, theirs = getattr(optim, name), THEIRS[name]
    saving, loading = (theirs, ours) if direction == "from bitsandbytes" else (ours, theirs)
    params, optimizer = make(saving, name, values)
    train(optimizer, params, 3, seed=1)
    saved = through_a_file(optimizer.state_dict())

    others, other = make(loading, name, params)
    other.load_state_dict(saved)
    for param, twin in zip(params, others):
        for key in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
            assert (key in other.state[twin]) == (key in optimizer.state[param])
            if key in other.state[twin]:
                assert torch.equal(other.state[twin][key], optimizer.state[param][key]), key
                assert other.state[twin][key].dtype == optimizer.state[param][key].dtype
        assert int(other.state[twin]["step"]) == 3
    before = [param.detach().clone() for param in params]
    train(optimizer, params, 1, seed=2)
    train(other, others, 1, seed=2)
    assert_same_step(others, params, before)


@interchanged
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_new_states_have_the_same_names_shapes_and_dtypes(name):
    described = []
    for cls in (getattr(optim, name), THEIRS[name]):
        params, optimizer = make(cls, name, [torch.randn(90, 60), torch.randn(17)])
        if name in OTHER_NORM:
            optimizer.args.max_unorm = 0.5  # there is one tensor more in the checkpoint
        train(optimizer, params, 1, seed=0)
        saved = copy.deepcopy(optimizer.state_dict())
        wrapped = [state.pop("__bnb_optimizer_quant_state__") for state in saved["state"].values()]
        described.append(
            [{key: (value.dtype, value.shape) for key, value in sorted(state.items())} for state in wrapped]
            + [sorted(state) for state in saved["state"].values()]
        )
        assert all(type(state["step"]) is int for state in saved["state"].values())
    assert described[0] == described[1]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" not in name and name not in BROKEN])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_twenty_32bit_steps(name):
    values = [torch.randn(90, 60), torch.randn(17)]
    (params, optimizer), (others, other) = make(getattr(optim, name), name, values), make(THEIRS[name], name, values)
    train(optimizer, params, 20, seed=3)
    train(other, others, 20, seed=3)
    for param, twin in zip(params, others):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-5)
