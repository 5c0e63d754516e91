"""Optimizer steps: every parameter rounded once from what float32 arithmetic may give, and every stored state."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import pytest
import torch

from bnb_core.ops.optimizer import required_states
from bnb_core.ops.spec import ALGORITHMS, OPTIMIZER_BLOCKSIZE, Hyperparameters
from bnb_core.testing import cases
from bnb_core.testing.calls import quantize_states
from bnb_core.testing.subject import KernelUnderTest, for_ops
from bnb_core.testing.tolerances import as_torch

for_both_formats = for_ops("optimizer_step_32bit_", "optimizer_step_8bit_blockwise_")

#: Hyperparameters large enough that every term shows in the result.
_ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3}
_ADEMAMIX = {**_ADAM, "beta3": 0.9999, "alpha": 5.0}
_DECOUPLED = {"weight_decay": 0.5, "decoupled_weight_decay": True}
_RMSPROP = {"beta2": 0.9, "eps": 1e-2}

VARIANTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "adam": ("adam", _ADAM),
    "adam-small-eps": ("adam", {**_ADAM, "beta2": 0.999, "eps": 1e-8}),
    "adam-decoupled": ("adam", {**_ADAM, **_DECOUPLED}),
    "adam-coupled": ("adam", {**_ADAM, "weight_decay": 0.5}),
    "adam-amsgrad": ("adam", {**_ADAM, "amsgrad": True}),
    "adam-no-bias-correction": ("adam", {**_ADAM, "bias_correction": False}),
    "adam-gnorm-scale": ("adam", {**_ADAM, **_DECOUPLED, "gnorm_scale": 0.3}),
    "adam-skip-zeros": ("adam", {**_ADAM, **_DECOUPLED, "skip_zeros": True}),
    "lamb": ("adam", {**_ADAM, **_DECOUPLED, "max_unorm": 0.1}),
    "lamb-within-limit": ("adam", {**_ADAM, "max_unorm": 1000.0}),
    "ademamix": ("ademamix", _ADEMAMIX),
    "ademamix-schedules": ("ademamix", {**_ADEMAMIX, **_DECOUPLED, "t_alpha": 20, "t_beta3": 50}),
    "ademamix-schedules-over": ("ademamix", {**_ADEMAMIX, "t_alpha": 2, "t_beta3": 2}),
    "lion": ("lion", {"beta1": 0.9, "beta2": 0.99}),
    "lion-decoupled": ("lion", {"beta1": 0.95, "beta2": 0.98, **_DECOUPLED}),
    "sgd": ("sgd", {"weight_decay": 0.5}),
    "sgd-momentum": ("sgd", {"momentum": 0.9}),
    "sgd-dampening": ("sgd", {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.5}),
    "sgd-nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "lars": ("sgd", {"momentum": 0.9, "weight_decay": 0.5, "max_unorm": 0.02}),
    "rmsprop": ("rmsprop", _RMSPROP),
    "rmsprop-momentum": ("rmsprop", {**_RMSPROP, "momentum": 0.9, "weight_decay": 0.5}),
    "rmsprop-centered": ("rmsprop", {**_RMSPROP, "centered": True}),
    "rmsprop-all": ("rmsprop", {**_RMSPROP, "centered": True, "momentum": 0.9, "gnorm_scale": 0.3, "skip_zeros": True}),
    "adagrad": ("adagrad", {"eps": 1e-2}),
    "adagrad-decay": ("adagrad", {"eps": 1e-10, "lr_decay": 0.1, "weight_decay": 0.5}),
}
#: States that hold squares or sums of them.
_NOT_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
PARAMETERS = ((1,), (256,), (257,), (3, 171))


def _normal(shape: Sequence[int], *seed: Any) -> np.ndarray:
    return cases.random("optimizer", shape, *seed).standard_normal(shape)


def _call(
    kernel: KernelUnderTest,
    variant: str,
    step: Any = 4,
    lr: Any = 0.1,
    shapes: Sequence[Tuple[int, ...]] = PARAMETERS,
    edit_grad: Callable[[torch.Tensor], None] = lambda grad: None,
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    new: bool = False,
    blocksize: int = OPTIMIZER_BLOCKSIZE,
) -> Tuple[Any, ...]:
    """Return the arguments of a step.

    Args:
        kernel: the op and dtype.
        variant: a key of `VARIANTS`.
        step, lr: of the op.
        shapes: of the parameters.
        edit_grad: changes a gradient in place.
        layout: gives a parameter other strides. States take them over if it is dense.
        new: all states are zero.
        blocksize: of 8-bit states.
    """
    algorithm, given = VARIANTS[variant]
    hyperparameters = Hyperparameters(**given)
    params = [layout(as_torch(_normal(shape, "param").astype(np.float32), kernel.dtype)) for shape in shapes]
    grads = [torch.empty_like(p).copy_(as_torch(_normal(p.shape, "grad").astype(np.float32), kernel.dtype)) for p in params]
    for grad in grads:
        edit_grad(grad)
    codebooks = cases.codebooks(256)
    states: List[List[torch.Tensor]] = []
    scales: List[List[torch.Tensor]] = []
    tables: List[Any] = []
    for name, needed in zip(ALGORITHMS[algorithm][:3], required_states(algorithm, hyperparameters)):
        if name is None or not needed:
            states.append([])
            scales.append([])
            tables.append(None)
            continue
        values = [_normal(param.shape, name) * (0.0 if new else 0.5) for param in params]
        positive = name.split()[0] in _NOT_NEGATIVE
        if positive:
            values = [value**2 + (0.0 if new else 0.5) for value in values]
        state = [as_torch(value.astype(np.float32), torch.float32) for value in values]
        if kernel.spec.name == "optimizer_step_8bit_blockwise_":
            table = codebooks["dynamic_unsigned" if positive else "dynamic"]
            codes, absmax = quantize_states(state, table, blocksize)
            states.append([torch.empty_like(p, dtype=torch.uint8).copy_(c) for p, c in zip(params, codes)])
            scales.append(absmax)
            tables.append(table)
        else:
            states.append([torch.empty_like(p, dtype=torch.float32).copy_(s) for p, s in zip(params, state)])
    tail = (algorithm, hyperparameters, step, lr)
    if kernel.spec.name == "optimizer_step_8bit_blockwise_":
        return (params, grads, *states, *scales, *tables, *tail, blocksize)
    return (params, grads, *states, *tail)


@for_both_formats
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_optimizer_step(bnb_kernel: KernelUnderTest, variant: str, step: int) -> None:
    bnb_kernel.verify(*_call(bnb_kernel, variant, step, edit_grad=_some_zeros))


def _some_zeros(grad: torch.Tensor) -> None:
    grad.view(-1)[::3] = 0


@for_both_formats
@pytest.mark.parametrize("algorithm", ["adam", "ademamix", "lion", "sgd-momentum", "rmsprop-all", "adagrad"])
def test_first_step_from_zero_states(bnb_kernel: KernelUnderTest, algorithm: str) -> None:
    bnb_kernel.verify(*_call(bnb_kernel, algorithm, step=1, new=True))


@for_both_formats
@pytest.mark.parametrize("variant", ["adam-decoupled", "lamb", "ademamix", "lion", "sgd", "lars", "rmsprop-all", "adagrad-decay"])
def test_non_finite_gradients_change_nothing(bnb_kernel: KernelUnderTest, variant: str) -> None:
    def edit(grad: torch.Tensor) -> None:
        grad.view(-1)[::5] = float("nan")
        grad.view(-1)[1::7] = float("inf")
        grad.view(-1)[-1] = float("-inf")
        grad.view(-1)[256:512] = float("nan")  # a whole block

    bnb_kernel.verify(*_call(bnb_kernel, variant, edit_grad=edit))


@for_both_formats
@pytest.mark.parametrize("variant", ["adam-decoupled", "ademamix-schedules", "lars", "rmsprop", "adagrad-decay", "lion"])
@pytest.mark.parametrize("step", [1, 7])
def test_step_and_rate_in_tensors(bnb_kernel: KernelUnderTest, variant: str, step: int) -> None:
    bnb_kernel.verify(*_call(bnb_kernel, variant, torch.tensor(float(step)), torch.tensor(0.1), shapes=((300,), (2, 5))))


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _gaps(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack((tensor, tensor), -1)[..., 0]


@for_both_formats
@pytest.mark.parametrize("variant", ["adam-decoupled", "lamb", "sgd-momentum"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [(_transposed, (30, 21)), (_channels_last, (3, 5, 7, 9)), (_gaps, (20, 31))],
    ids=["transposed", "channels_last", "gaps"],
)
def test_parameters_of_any_strides(
    bnb_kernel: KernelUnderTest, layout: Callable[[torch.Tensor], torch.Tensor], shape: Tuple[int, ...], variant: str
) -> None:
    bnb_kernel.verify(*_call(bnb_kernel, variant, shapes=(shape,), layout=layout))


@for_both_formats
def test_gradients_of_other_strides(bnb_kernel: KernelUnderTest) -> None:
    params, grads, *rest = _call(bnb_kernel, "adam-decoupled", shapes=((30, 21), (8, 64)))
    bnb_kernel.verify(params, [_transposed(grads[0]), _gaps(grads[1])], *rest)


@for_both_formats
def test_lists_with_empty_tensors(bnb_kernel: KernelUnderTest) -> None:
    bnb_kernel.verify(*_call(bnb_kernel, "adam-decoupled", shapes=((0,), (300,), (4, 0), (5,))))
    bnb_kernel.verify(*_call(bnb_kernel, "adam-decoupled", shapes=((0,),)))


@for_both_formats
def test_many_tensors(bnb_kernel: KernelUnderTest) -> None:
    bnb_kernel.verify(*_call(bnb_kernel, "adam-decoupled", shapes=tuple((1 + i * 37 % 300,) for i in range(50))))


@for_ops("optimizer_step_8bit_blockwise_")
@pytest.mark.parametrize("blocksize", [64, 100, 4096])
def test_blocks_of_other_sizes(bnb_kernel: KernelUnderTest, blocksize: int) -> None:
    bnb_kernel.verify(*_call(bnb_kernel, "adam-decoupled", shapes=((1000,), (7, 9)), blocksize=blocksize))


@for_ops("optimizer_step_8bit_blockwise_")
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30])
def test_states_of_any_size(bnb_kernel: KernelUnderTest, scale: float) -> None:
    """Blocks of states that are zero, too small to divide by, and huge."""

    def edit(grad: torch.Tensor) -> None:
        grad.copy_((grad.double() * scale).clamp(-torch.finfo(grad.dtype).max, torch.finfo(grad.dtype).max))

    bnb_kernel.verify(*_call(bnb_kernel, "sgd-momentum", step=1, edit_grad=edit))
