"""The optimizer oracle against torch.optim in float64, and against the papers where torch has no such algorithm."""

import math

import numpy as np
import pytest
import torch

from bnb_core.ops.optimizer import required_states
from bnb_core.ops.spec import Hyperparameters
from bnb_core.testing import optimizer_oracle

N, STEPS, LR = 50, 6, 0.05


def steps(algorithm, hyperparameters, grads, start):
    param = start.copy()
    states = tuple(np.zeros(N) if needed else None for needed in required_states(algorithm, hyperparameters))
    for t, grad in enumerate(grads, 1):
        result = optimizer_oracle.step(algorithm, hyperparameters, t, LR, param, grad, states)
        param, states = result.param.value, tuple(state and state.value for state in result.states)
    return param


@pytest.fixture
def problem():
    rng = np.random.default_rng(3)
    return rng.standard_normal((STEPS, N)), rng.standard_normal(N)


ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-3}
TORCH = {
    "Adam": ("adam", ADAM, {}),
    "Adam with weight decay": ("adam", {**ADAM, "weight_decay": 0.1}, {"weight_decay": 0.1}),
    "Adam with amsgrad": ("adam", {**ADAM, "amsgrad": True}, {"amsgrad": True}),
    "AdamW": ("adam", {**ADAM, "weight_decay": 0.1, "decoupled_weight_decay": True}, {"weight_decay": 0.1}),
    "SGD": ("sgd", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "SGD with momentum": ("sgd", {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "dampening": 0.3}),
    "SGD with nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    "RMSprop": ("rmsprop", {"beta2": 0.9, "eps": 1e-3}, {"alpha": 0.9, "eps": 1e-3}),
    "RMSprop centered with momentum": (
        "rmsprop",
        {"beta2": 0.9, "eps": 1e-3, "centered": True, "momentum": 0.5},
        {"alpha": 0.9, "eps": 1e-3, "centered": True, "momentum": 0.5},
    ),
    "Adagrad": ("adagrad", {"eps": 1e-3, "lr_decay": 0.2}, {"eps": 1e-3, "lr_decay": 0.2}),
}


@pytest.mark.parametrize("name", TORCH)
def test_like_torch(problem, name):
    grads, start = problem
    algorithm, ours, theirs = TORCH[name]
    if algorithm == "adam":
        theirs = {"betas": (0.9, 0.95), "eps": 1e-3, **theirs}
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = getattr(torch.optim, name.split()[0])([param], lr=LR, **theirs)
    for grad in grads:
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    np.testing.assert_allclose(steps(algorithm, Hyperparameters(**ours), grads, start), param.detach().numpy(), rtol=1e-12)


def test_lion(problem):
    grads, start = problem
    expected, m = start.copy(), np.zeros(N)
    for g in grads:
        expected = expected * (1 - LR * 0.1) - LR * np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    h = Hyperparameters(beta1=0.9, beta2=0.99, weight_decay=0.1, decoupled_weight_decay=True)
    np.testing.assert_allclose(steps("lion", h, grads, start), expected, rtol=1e-12)


def test_ademamix(problem):
    grads, start = problem
    expected, m, n, v = start.copy(), np.zeros(N), np.zeros(N), np.zeros(N)
    for t, g in enumerate(grads, 1):
        alpha = min(t / 10, 1) * 5
        slow = min(math.exp(math.log(0.9) * math.log(0.99) / ((1 - t / 4) * math.log(0.99) + t / 4 * math.log(0.9))), 0.99)
        m, n, v = 0.9 * m + 0.1 * g, slow * n + (1 - slow) * g, 0.95 * v + 0.05 * g * g
        expected -= LR * (m / (1 - 0.9**t) + alpha * n) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
    h = Hyperparameters(**ADAM, beta3=0.99, alpha=5.0, t_alpha=10, t_beta3=4)
    np.testing.assert_allclose(steps("ademamix", h, grads, start), expected, rtol=1e-12)


def test_length_of_the_update_is_limited(problem):
    grads, start = problem
    free = optimizer_oracle.step("sgd", Hyperparameters(), 1, LR, start, grads[0], (None, None, None))
    tied = optimizer_oracle.step("sgd", Hyperparameters(max_unorm=0.01), 1, LR, start, grads[0], (None, None, None))
    assert np.linalg.norm(free.param.value - start) == pytest.approx(LR * np.linalg.norm(grads[0]))
    assert np.linalg.norm(tied.param.value - start) == pytest.approx(LR * 0.01 * np.linalg.norm(start))


@pytest.mark.parametrize("grad", [np.nan, np.inf, -np.inf, 0.0])
def test_elements_left_alone(grad):
    h = Hyperparameters(**ADAM, weight_decay=0.5, decoupled_weight_decay=True, skip_zeros=True)
    values = [np.array([value, value]) for value in (1.0, 0.5, 0.25)]
    result = optimizer_oracle.step("adam", h, 3, LR, values[0], np.array([grad, 1.0]), (values[1], values[2], None))
    found = [result.param, *result.states[:2]]
    assert [number.value[0] for number in found] == [1.0, 0.5, 0.25]
    assert [number.error[0] for number in found] == [0.0, 0.0, 0.0]
    assert all(number.value[1] != value[1] for number, value in zip(found, values))
