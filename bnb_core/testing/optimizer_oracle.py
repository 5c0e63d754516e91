"""One optimizer step as `bnb_core.ops.spec` defines it, in float64 with the error that float32 arithmetic may make."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Tuple

import numpy as np

from bnb_core.ops.spec import Hyperparameters
from bnb_core.testing.rounding import Rounded

States = Tuple[Optional[Rounded], Optional[Rounded], Optional[Rounded]]


class Step(NamedTuple):
    """What becomes of one parameter tensor."""

    param: Rounded
    states: States


def step(
    algorithm: str,
    hyperparameters: Hyperparameters,
    t: int,
    lr: float,
    param: np.ndarray,
    grad: np.ndarray,
    states: Tuple[Optional[np.ndarray], ...],
) -> Step:
    """Update one tensor.

    Args:
        algorithm: a key of `bnb_core.ops.spec.ALGORITHMS`.
        hyperparameters: see `bnb_core.ops.spec.Hyperparameters`, whose steps 1 to 5 are those below.
        t: 1 at the first step.
        lr: learning rate.
        param, grad, states: values before the step; a state that the algorithm does not use is None.
    """
    h = hyperparameters
    alone = ~np.isfinite(grad)
    if h.skip_zeros:
        alone |= grad == 0

    p = Rounded.exact(param)
    g = Rounded.exact(np.where(alone, 0.0, grad))
    if h.gnorm_scale != 1.0:
        g = g * h.gnorm_scale
    if h.weight_decay and h.decoupled_weight_decay:
        p = p * (1 - lr * h.weight_decay)
    elif h.weight_decay:
        g = g + p * h.weight_decay

    first, second, third = (None if state is None else Rounded.exact(state) for state in states)
    before = (first, second, third)
    u, after = _RULES[algorithm](h, t, g, before)
    u = u.where(~alone, 0.0)

    if h.max_unorm > 0:
        limit = Rounded.exact(param).norm() * h.max_unorm
        size = u.norm()
        if limit.value > 0 and size.value > limit.value:
            u = u * (limit / size)

    p = (p - u * lr).where(~alone, param)
    first, second, third = (None if b is None or a is None else a.where(~alone, b) for a, b in zip(after, before))
    return Step(p, (first, second, third))


def _adam(h: Hyperparameters, t: int, g: Rounded, states: States) -> Tuple[Rounded, States]:
    m, v, largest = states
    assert m is not None
    assert v is not None
    m = m * h.beta1 + g * (1 - h.beta1)
    v = v * h.beta2 + g * g * (1 - h.beta2)
    w = v if largest is None else largest.maximum(v)
    c1, c2 = _bias_corrections(h, t)
    return (m / c1) / (w.sqrt() / c2 + h.eps), (m, v, None if largest is None else w)


def _ademamix(h: Hyperparameters, t: int, g: Rounded, states: States) -> Tuple[Rounded, States]:
    m, v, n = states
    assert m is not None
    assert v is not None
    assert n is not None
    alpha = min(t * h.alpha / h.t_alpha, h.alpha) if h.t_alpha else h.alpha
    beta3 = h.beta3
    if h.t_beta3:
        ln1, ln3, progress = math.log(h.beta1), math.log(h.beta3), t / h.t_beta3
        beta3 = min(math.exp(ln1 * ln3 / ((1 - progress) * ln3 + progress * ln1)), h.beta3)
    m = m * h.beta1 + g * (1 - h.beta1)
    n = n * beta3 + g * (1 - beta3)
    v = v * h.beta2 + g * g * (1 - h.beta2)
    c1, c2 = _bias_corrections(h, t)
    return (m / c1 + n * alpha) / (v.sqrt() / c2 + h.eps), (m, v, n)


def _bias_corrections(h: Hyperparameters, t: int) -> Tuple[float, float]:
    return (1 - h.beta1**t, math.sqrt(1 - h.beta2**t)) if h.bias_correction else (1.0, 1.0)


def _lion(h: Hyperparameters, t: int, g: Rounded, states: States) -> Tuple[Rounded, States]:
    m = states[0]
    assert m is not None
    u = (m * h.beta1 + g * (1 - h.beta1)).sign()
    return u, (m * h.beta2 + g * (1 - h.beta2), None, None)


def _sgd(h: Hyperparameters, t: int, g: Rounded, states: States) -> Tuple[Rounded, States]:
    b = states[0]
    if b is None:
        return g, (None, None, None)
    b = g if t == 1 else b * h.momentum + g * (1 - h.dampening)
    return (g + b * h.momentum if h.nesterov else b), (b, None, None)


def _rmsprop(h: Hyperparameters, t: int, g: Rounded, states: States) -> Tuple[Rounded, States]:
    v, b, a = states
    assert v is not None
    v = v * h.beta2 + g * g * (1 - h.beta2)
    d = v
    if a is not None:
        a = a * h.beta2 + g * (1 - h.beta2)
        d = (v - a * a).maximum(0.0)
    q = g / (d.sqrt() + h.eps)
    if b is None:
        return q, (v, None, a)
    b = b * h.momentum + q
    return b, (v, b, a)


def _adagrad(h: Hyperparameters, t: int, g: Rounded, states: States) -> Tuple[Rounded, States]:
    total = states[0]
    assert total is not None
    total = total + g * g
    return g / ((total.sqrt() + h.eps) * (1 + (t - 1) * h.lr_decay)), (total, None, None)


_RULES = {"adam": _adam, "ademamix": _ademamix, "lion": _lion, "sgd": _sgd, "rmsprop": _rmsprop, "adagrad": _adagrad}
