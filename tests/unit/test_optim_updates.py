"""One step of one parameter on states that the caller keeps: the same as an optimizer's, and nothing is ignored."""

import pytest
import torch

from bnb_core import functional as F
from bnb_core import optim
from bnb_core.errors import InvalidArgumentError
from bnb_core.optim.optimizer import MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit

#: The optimizer of each name, its options, and the same as the arguments of the functions.
CASES = {
    "adam": (optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-4}, {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4}),
    "lamb": (optim.LAMB, {"betas": (0.8, 0.95), "eps": 1e-4, "max_unorm": 0.0}, {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4}),
    "ademamix": (
        optim.AdEMAMix,
        {"betas": (0.8, 0.95, 0.99), "alpha": 3.0, "eps": 1e-4},
        {"beta1": 0.8, "beta2": 0.95, "beta3": 0.99, "alpha": 3.0, "eps": 1e-4},
    ),
    "momentum": (optim.SGD, {"momentum": 0.8, "dampening": 0.2}, {"beta1": 0.8, "beta2": 0.2, "eps": 0.0}),
    "lars": (optim.LARS, {"momentum": 0.8, "max_unorm": 0.0}, {"beta1": 0.8, "eps": 0.0}),
    "rmsprop": (optim.RMSprop, {"alpha": 0.8, "eps": 1e-4}, {"beta1": 0.8, "eps": 1e-4}),
    "adagrad": (optim.Adagrad, {"eps": 1e-4}, {"beta1": 0.0, "eps": 1e-4}),
    "lion": (optim.Lion, {"betas": (0.8, 0.95)}, {"beta1": 0.8, "beta2": 0.95, "eps": 0.0}),
}
cases = pytest.mark.parametrize("name", CASES)
TENSORS = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")


def trained(name, bits):
    """A parameter and its states after a step of the optimizer, which goes on by itself."""
    cls, options, arguments = CASES[name]
    param = torch.nn.Parameter(torch.randn(30, 20))
    optimizer = cls([param], lr=0.01, weight_decay=0.1, optim_bits=bits, min_8bit_size=1, **options)
    param.grad = torch.randn(30, 20)
    optimizer.step()
    state = {key: optimizer.state[param][key].clone() for key in TENSORS if key in optimizer.state[param]}
    return optimizer, param, param.detach().clone(), state, {"weight_decay": 0.1, "step": 2, "lr": 0.01, **arguments}


def next_step(optimizer, param, grad):
    param.grad = grad.clone()
    optimizer.step()
    return param


@cases
def test_32_bits(name):
    optimizer, expected, p, state, arguments = trained(name, 32)
    g = torch.randn(30, 20)
    next_step(optimizer, expected, g)
    F.optimizer_update_32bit(name, g, p, **state, **arguments)
    assert torch.equal(p, expected)
    for key, tensor in state.items():
        assert torch.equal(tensor, optimizer.state[expected][key]), key


@cases
def test_8_bits(name):
    optimizer, expected, p, state, arguments = trained(name, 8)
    g = torch.randn(30, 20)
    next_step(optimizer, expected, g)
    defaults = dict.fromkeys(TENSORS[1::2])
    F.optimizer_update_8bit_blockwise(name, g, p, **{"beta2": 0.0, "beta3": 0.0, "alpha": 0.0, **defaults, **state, **arguments})
    assert torch.equal(p, expected)
    for key, tensor in state.items():
        assert torch.equal(tensor, optimizer.state[expected][key]), key


@pytest.mark.parametrize(("name", "max_unorm"), [("lamb", 0.25), ("lars", 0.02), ("rmsprop", 0.5)])
def test_update_norm(name, max_unorm):
    _, _, p, state, arguments = trained(name, 32)
    arguments.update(weight_decay=0.0)
    g, before, unorm = torch.randn(30, 20), p.clone(), torch.zeros(1)
    free, free_state = p.clone(), {key: tensor.clone() for key, tensor in state.items()}
    F.optimizer_update_32bit(name, g, free, **free_state, **arguments)
    F.optimizer_update_32bit(name, g, p, **state, **arguments, unorm_vec=unorm, max_unorm=max_unorm)
    length = (before.double() - free.double()).norm() / arguments["lr"]
    torch.testing.assert_close(unorm[0].double(), length, rtol=1e-3, atol=0)
    moved = (before.double() - p.double()).norm() / arguments["lr"]
    torch.testing.assert_close(moved, torch.minimum(length, max_unorm * before.double().norm()), rtol=1e-3, atol=0)
    assert moved < length, "the limit was not reached"


def test_gradients_are_scaled_and_zeros_skipped():
    _, _, p, state, arguments = trained("adam", 32)
    g = torch.randn(30, 20)
    g[0] = 0.0
    other, before = p.clone(), p.clone()
    F.optimizer_update_32bit("adam", g * 0.25, other, **{k: v.clone() for k, v in state.items()}, **arguments)
    F.optimizer_update_32bit("adam", g, p, **state, **arguments, gnorm_scale=0.25, skip_zeros=True)
    assert torch.equal(p[0], before[0])
    assert not torch.equal(other[0], before[0])
    assert torch.equal(p[1:], other[1:])


def test_without_momentum_no_state_is_written():
    p, g, state = torch.ones(3), torch.full((3,), 0.5), torch.full((3,), 7.0)
    F.optimizer_update_32bit("momentum", g, p, state, 0.0, 0.0, 2, 1.0)
    assert torch.equal(p, torch.full((3,), 0.5))
    assert torch.equal(state, torch.full((3,), 7.0))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamw", {}, "optimizer_name is 'adamw'; it must be one of momentum, lars, rmsprop, adagrad, lion, adam, lamb, ademamix"),
        ("adam", {"alpha": 1.0}, "alpha is 1.0, but Adam has no alpha"),
        ("adam", {"beta3": 0.9}, "beta3 is 0.9, but 'adam' has none"),
        ("lion", {"eps": 1e-8, "state2": None}, "eps is 1e-08, but Lion has no eps"),
        ("rmsprop", {"beta2": 0.9, "state2": None}, "the momentum of 'rmsprop' needs a state"),
        ("rmsprop", {"alpha": 0.9, "state2": None}, "alpha is 0.9, but 'rmsprop' takes its own as beta1"),
        ("adagrad", {"state2": None}, r"betas is \(0.9, 0.0\), but Adagrad has no betas"),
        ("adam", {"state2": None}, "'adam' takes the tensors state1, state2; state1 are given"),
        ("lion", {"eps": 0.0}, "'lion' takes the tensors state1; state1, state2 are given"),
        ("adam", {"step": 0}, "step is 0; it counts from 1"),
    ],
)
def test_what_an_algorithm_does_not_take_is_refused(name, arguments, message):
    p, before = torch.ones(3), torch.ones(3)
    given = {"beta1": 0.9, "eps": 1e-8, "step": 1, "lr": 0.1, "state2": torch.zeros(3), **arguments}
    with pytest.raises(InvalidArgumentError, match=message):
        F.optimizer_update_32bit(name, torch.ones(3), p, torch.zeros(3), **given)
    assert torch.equal(p, before)


# ---------------------------------------------------------------------------------------------------- optimizers by name


@cases
@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizer_by_name_steps_as_that_of_its_class(name, bits):
    cls, options, arguments = CASES[name]
    two = name in ("adam", "lamb", "ademamix")
    betas = (arguments["beta1"], arguments.get("beta2", 0.0), arguments.get("beta3", 0.0))[: 3 if name == "ademamix" else 2]
    general = {"optim_bits": bits, "min_8bit_size": 256, "weight_decay": 0.1, "lr": 0.01}
    more = {"alpha": arguments["alpha"]} if "alpha" in arguments else {}
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 600).view(30, 20)) for _ in range(2)]
    named = (Optimizer2State if two else Optimizer1State)(name, [params[0]], betas=betas, eps=arguments["eps"], **general, **more)
    direct = cls([params[1]], **options, **general)
    for _ in range(3):
        grad = torch.randn(30, 20)
        for optimizer, param in zip((named, direct), params):
            next_step(optimizer, param, grad)
    assert torch.equal(*params)
    assert named.state_dict()["state"].keys() == direct.state_dict()["state"].keys()
    direct.load_state_dict(named.state_dict())


class _Own(Optimizer2State):
    """As clients of bitsandbytes derive theirs."""

    def __init__(self, params, lr):
        super().__init__("adam", params, lr, max_unorm=0.5, skip_zeros=True)


def test_derived_optimizers_are_copied_with_their_algorithm():
    import copy
    import pickle

    param = torch.nn.Parameter(torch.ones(4))
    optimizer = _Own([param], 0.1)
    assert isinstance(optimizer, Optimizer8bit)
    assert (optimizer.args.max_unorm, optimizer.args.skip_zeros) == (0.5, True)
    next_step(optimizer, param, torch.ones(4))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (twin,) = other.param_groups[0]["params"]
        next_step(other, twin, torch.ones(4))
        assert not torch.equal(twin, param)
    next_step(optimizer, param, torch.ones(4))
    assert torch.equal(twin, param)


def test_options_without_effect_are_refused():
    params = [torch.nn.Parameter(torch.ones(4))]
    with pytest.raises(InvalidArgumentError, match=r"Optimizer1State: eps is 0\.1, but Lion has no eps"):
        Optimizer1State("lion", params, eps=0.1)
    with pytest.raises(InvalidArgumentError, match=r"Optimizer1State: betas is \(0.5, 0.0\), but Adagrad has no betas"):
        Optimizer1State("adagrad", params, betas=(0.5, 0.0))
    with pytest.raises(InvalidArgumentError, match=r"Optimizer1State: betas is \(0.9, 0.0, 0.5\), but SGD has no betas"):
        Optimizer1State("momentum", params, betas=(0.9, 0.0, 0.5))
    with pytest.raises(InvalidArgumentError, match=r"Optimizer1State: betas are .*there must be 2"):
        Optimizer1State("lion", params, betas=(0.9, 0.0, 0.5))
    with pytest.raises(InvalidArgumentError, match="Optimizer2State: t_alpha is 10, but Adam has no t_alpha"):
        Optimizer2State("adam", params, t_alpha=10)
    with pytest.raises(
        InvalidArgumentError, match="Optimizer2State: optimizer_name is 'lion'; it must be one of adam, lamb, ademamix"
    ):
        Optimizer2State("lion", params)
    with pytest.raises(InvalidArgumentError, match="Optimizer1State: nesterov with momentum"):
        Optimizer1State("momentum", [{"params": params, "nesterov": True}], betas=(0.9, 0.5))


def test_the_base_has_no_algorithm():
    with pytest.raises(InvalidArgumentError, match="Optimizer has no algorithm; derive from a class that has, such as Adam"):
        Optimizer8bit([torch.nn.Parameter(torch.ones(4))], {"lr": 0.1})


def test_mock_args():
    args = MockArgs({"optim_bits": 8, "more": [1]})
    assert (args.optim_bits, args.more) == (8, [1])
