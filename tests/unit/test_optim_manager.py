"""Options for single parameters."""

import gc
import weakref

import pytest
import torch

from bnb_core import optim
from bnb_core.errors import BnbError, InvalidArgumentError


@pytest.fixture
def manager():
    manager = optim.GlobalOptimManager.get_instance()
    yield manager
    manager.initialize()


def stepped(cls, params, **options):
    optimizer = cls(params, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def make(*sizes):
    return [torch.nn.Parameter(torch.ones(size)) for size in sizes]


def test_there_is_one_manager(manager):
    assert optim.GlobalOptimManager.get_instance() is manager
    with pytest.raises(BnbError, match="get_instance"):
        optim.GlobalOptimManager()


def test_what_is_registered_are_parameters(manager):
    params = make(3, 4)
    manager.register_parameters(params)
    manager.register_parameters(param for param in params)
    manager.register_parameters([{"params": params, "lr": 0.1}])
    for wrong in (["weight"], [{"params": ["weight"]}], [{"lr": 0.1}]):
        with pytest.raises(InvalidArgumentError, match="is no parameter; pass tensors, or groups"):
            manager.register_parameters(wrong)


@pytest.mark.parametrize("registered", [False, True])
def test_one_parameter_has_32bit_states(manager, registered):
    params = make(5000, 5000)
    if registered:
        manager.register_parameters(params)
    manager.override_config(params[1], "optim_bits", 32)
    optimizer = stepped(optim.Adam, params, optim_bits=8)
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.uint8, torch.float32]


def test_several_parameters_and_options_at_once(manager):
    params = make(10, 10, 10)
    manager.override_config(params[:2], key_value_dict={"lr": 0.5, "weight_decay": 0.0})
    manager.override_config(params[1], "lr", 0.25)
    stepped(optim.SGD, params, lr=0.125)
    assert [p[0].item() for p in params] == [0.5, 0.75, 0.875]


def test_overrides_hold_from_the_next_step_on(manager):
    (param,) = make(10)
    optimizer = stepped(optim.SGD, [param], lr=0.125)
    manager.override_config(param, "lr", 0.5)
    optimizer.step()
    manager.initialize()
    optimizer.step()
    assert param[0].item() == 1 - 0.125 - 0.5 - 0.125


def test_names_of_bitsandbytes_for_algorithms_without_betas(manager):
    (param,) = make(10)
    manager.override_config(param, "betas", (0.5, 0.25))
    optimizer = stepped(optim.SGD, [param], lr=0.125, momentum=0.9)
    optimizer.step()
    assert param[0].item() == 1 - 0.125 * (1 + 0.5 + 0.75)


def test_module_override_is_looked_up_when_a_step_is_taken(manager):
    module = torch.nn.Linear(100, 100)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = torch.nn.Parameter(torch.ones(100, 100))
    optimizer = stepped(optim.AdamW8bit, list(module.parameters()))
    assert optimizer.state[module.weight]["state1"].dtype == torch.float32
    other = torch.nn.Linear(100, 100)
    assert stepped(optim.AdamW8bit, list(other.parameters())).state[other.weight]["state1"].dtype == torch.uint8


def test_override_of_a_parameter_wins_over_that_of_its_module(manager):
    module = torch.nn.Linear(3, 3)
    manager.override_config(module.weight, "lr", 0.5)
    manager.register_module_override(module, "weight", {"lr": 0.25, "weight_decay": 0.125})
    assert manager.overrides() == {id(module.weight): {"lr": 0.5, "weight_decay": 0.125}}


def test_nothing_is_kept_alive(manager):
    module = torch.nn.Linear(3, 3)
    manager.override_config(module.weight, "lr", 0.5)
    manager.register_module_override(module, "bias", {"lr": 0.25})
    del module
    gc.collect()
    assert manager.overrides() == {}


def test_the_address_of_a_parameter_that_is_gone_may_be_used_again(manager):
    gone, (param,) = make(3), make(3)
    reference = weakref.ref(gone.pop())
    gc.collect()
    manager._params[id(param)] = (reference, {"lr": 0.5})  # as if it had had this address
    manager.override_config(param, "weight_decay", 0.25)
    assert manager.overrides() == {id(param): {"weight_decay": 0.25}}


def test_refuses(manager):
    (param,) = make(3)
    with pytest.raises(InvalidArgumentError, match="give one of them"):
        manager.override_config(param)
    with pytest.raises(InvalidArgumentError, match="give one of them"):
        manager.override_config(param, "lr", 1.0, {"lr": 1.0})
    manager.override_config(param, "beta", 0.5)
    with pytest.raises(InvalidArgumentError, match="sets beta for a parameter of Adam, whose options are lr, betas, eps"):
        stepped(optim.Adam, [param])
    manager.initialize()
    manager.override_config(param, "lr", -0.5)
    with pytest.raises(InvalidArgumentError, match=r"lr is -0\.5"):
        stepped(optim.Adam, [param])
    manager.initialize()
    module = torch.nn.Linear(3, 3, bias=False)
    manager.register_module_override(module, "bias", {"lr": 0.5})
    with pytest.raises(InvalidArgumentError, match="'bias' of Linear is None"):
        stepped(optim.Adam, list(module.parameters()))
