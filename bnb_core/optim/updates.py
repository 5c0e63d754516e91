"""One step of one parameter, on states that the caller keeps: `optimizer_update_32bit`, `optimizer_update_8bit_blockwise`."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.spec import OPTIMIZER_BLOCKSIZE, Hyperparameters
from bnb_core.optim.by_name import ONE_STATE, TWO_STATES, algorithm_named, options_for
from bnb_core.optim.state_formats import FORMATS, State, StateFormat

_ALGORITHMS = {**ONE_STATE, **TWO_STATES}


@torch.no_grad()
def optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Optional[torch.Tensor] = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Optional[torch.Tensor] = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Update a parameter and its float32 states in place.

    Args:
        optimizer_name: "adam", "lamb", "ademamix", "momentum" (SGD), "lars", "rmsprop", "adagrad" or "lion".
        g: the gradient, of the parameter's dtype.
        p: the parameter, float32, float16 or bfloat16.
        state1: float32 of its shape; [2, *shape] for "ademamix".
        beta1: decay rate of the average of the gradient; the momentum of "momentum" and "lars"; the decay rate of the average of
            squares of "rmsprop". "adagrad" has none: 0.
        eps: added to the denominator. "momentum", "lars" and "lion" have none: 0.
        step: 1 at the first step.
        lr: learning rate.
        state2: float32 of its shape, for "adam", "lamb" and "ademamix"; the others have none.
        beta2: decay rate of the average of squares; that of the average of "lion" which is kept; the dampening of "momentum" and
            "lars". The others have none: 0.
        beta3, alpha: decay rate and weight of the slow average of "ademamix". The others have none: 0.
        weight_decay: see the class of the algorithm.
        gnorm_scale: the gradient is multiplied by this.
        unorm_vec: float32 [1] to write the L2 norm of the update to, as it is before `max_unorm` limits it and without lr.
        max_unorm: the update's norm is at most this many times the parameter's; 0 for no limit.
        skip_zeros: leave elements alone whose gradient is zero.

    Raises:
        InvalidArgumentError: an option that the algorithm has not, or a dtype, shape or device that does not fit.
    """
    function = "optimizer_update_32bit"
    hyperparameters = _hyperparameters(
        function, optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros
    )
    state = _given(state1=state1, state2=state2)
    if unorm_vec is not None:
        unorm_vec.copy_(_update_norm(function, optimizer_name, hyperparameters, g, p, state, step))
    _step(FORMATS[32], function, optimizer_name, hyperparameters, g, p, state, step, lr)


@torch.no_grad()
def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: Optional[torch.Tensor],
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: torch.Tensor,
    qmap2: Optional[torch.Tensor],
    absmax1: torch.Tensor,
    absmax2: Optional[torch.Tensor],
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """Update a parameter and its 8-bit states in place; they are quantized in blocks of 256 (arXiv 2110.02861).

    Args:
        optimizer_name, g, p, beta1, beta2, beta3, alpha, eps, step, lr, weight_decay, gnorm_scale, skip_zeros: as in
            `optimizer_update_32bit`.
        state1, state2: uint8 codes of the shapes that the states have there.
        qmap1, qmap2: their codebooks, float32 [256].
        absmax1, absmax2: their scales, float32 [ceil(n / 256)]; [2, ceil(n / 256)] for the first of "ademamix".

    Raises:
        InvalidArgumentError: an option that the algorithm has not, or a dtype, shape or device that does not fit.
    """
    function = "optimizer_update_8bit_blockwise"
    hyperparameters = _hyperparameters(
        function, optimizer_name, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, 0.0, skip_zeros
    )
    state = _given(state1=state1, state2=state2, qmap1=qmap1, qmap2=qmap2, absmax1=absmax1, absmax2=absmax2)
    _step(FORMATS[8], function, optimizer_name, hyperparameters, g, p, state, step, lr)


def _given(**tensors: Optional[torch.Tensor]) -> State:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _hyperparameters(
    function: str,
    name: str,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    gnorm_scale: float,
    max_unorm: float,
    skip_zeros: bool,
) -> Hyperparameters:
    cls = algorithm_named(function, name, _ALGORITHMS)
    betas = (beta1, beta2, beta3)[: max(cls.number_of_betas, len(cls.in_betas))]
    if beta3 and len(betas) < 3:
        raise InvalidArgumentError(f"{function}: beta3 is {beta3}, but {name!r} has none; pass 0")
    if name == "rmsprop" and beta2:
        raise InvalidArgumentError(f"{function}: beta2 is {beta2}, but the momentum of 'rmsprop' needs a state; use optim.RMSprop")
    given: Dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    if "alpha" not in cls.in_betas:
        given["alpha"] = alpha
    elif alpha:
        raise InvalidArgumentError(f"{function}: alpha is {alpha}, but {name!r} takes its own as beta1; pass 0")
    options = {**options_for(function, cls, given), "max_unorm": max_unorm, "skip_zeros": skip_zeros}
    return cls.hyperparameters(options)._replace(gnorm_scale=float(gnorm_scale))


def _step(
    format: StateFormat,
    function: str,
    name: str,
    hyperparameters: Hyperparameters,
    g: torch.Tensor,
    p: torch.Tensor,
    state: State,
    step: int,
    lr: float,
) -> None:
    cls = _ALGORITHMS[name]
    slots = cls.slots_for(hyperparameters)
    needed = {f"{part}{slot.number}" for slot in slots if slot is not None for part in format.names}
    if not hyperparameters.momentum and name in ("momentum", "lars"):
        state = {}  # the first gradient is all that there is of a sum that forgets at once
    if needed != set(state):
        given = ", ".join(sorted(state))
        raise InvalidArgumentError(f"{function}: {name!r} takes the tensors {', '.join(sorted(needed))}; {given} are given")
    tail = (OPTIMIZER_BLOCKSIZE,) if format is FORMATS[8] else ()
    format.op([p], [g], *format.arguments([state], slots), cls.algorithm, hyperparameters, step, lr, *tail)


def _update_norm(
    function: str, name: str, hyperparameters: Hyperparameters, g: torch.Tensor, p: torch.Tensor, state: State, step: int
) -> torch.Tensor:
    """Return the L2 norm of an update: that of a step of length 1 from zero, on copies of the states."""
    gradient = g.float() * hyperparameters.gnorm_scale
    if not hyperparameters.decoupled_weight_decay:
        gradient = gradient + hyperparameters.weight_decay * p.float()
    free = hyperparameters._replace(gnorm_scale=1.0, weight_decay=0.0, max_unorm=0.0)
    update = torch.zeros_like(gradient)
    copies = {key: tensor.clone() for key, tensor in state.items()}
    _step(FORMATS[32], function, name, free, gradient, update, copies, step, 1.0)
    return update.norm()
