"""Optimizer steps over lists of tensors: checks, storage order and signatures."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops import checks
from bnb_core.ops.arguments import conform
from bnb_core.ops.layouts import Layouts
from bnb_core.ops.outputs import Output, contiguous_strides, mark_written
from bnb_core.ops.plain import is_plain, ordinary_execution
from bnb_core.ops.schema import tensors_of
from bnb_core.ops.spec import ALGORITHMS, OPTIMIZER_BLOCKSIZE, Hyperparameters
from bnb_core.ops.structured import StructuredOp

Tensors = Sequence[torch.Tensor]
Number = Union[float, torch.Tensor]

_STATES = ("state1", "state2", "state3")


class OptimizerStep(StructuredOp):
    """An op that updates lists of tensors in place.

    Kernels see each parameter, gradient and state as a dense tensor whose elements correspond in storage order: whatever the
    strides are, they may read and write `numel()` consecutive elements. What is not so is copied, and copied back afterwards.
    """

    def call(self, args: Tuple[Any, ...], out: Any = None) -> None:
        """Update in place, directly where that is right and through the torch dispatcher otherwise."""
        if out is not None:
            raise InvalidArgumentError(f"{self.spec.name}: out is given, but the op updates its arguments in place; leave it away")
        args = conform(self.spec, args)
        if ordinary_execution() and is_plain(tensors_of(self.spec, args)):
            self.run(*args)
        else:
            self.dispatch(args)

    def run(self, *args: Any) -> None:
        """Check, bring into storage order, resolve and run."""
        self.check(args)
        keep = [i for i, param in enumerate(args[0]) if param.numel()]
        if not keep:
            return
        if len(keep) < len(args[0]):
            args = tuple([value[i] for i in keep] if self._is_tensor_list(at) and value else value for at, value in enumerate(args))
        if args[0][0].device.type == "meta":
            return
        args, copies = self._in_storage_order(args)
        self.run_checked(*args)
        for original, copy in copies:
            original.copy_(copy)

    def run_checked(self, *args: Any) -> None:
        """Resolve and run. The arguments have passed `run`'s checks, are in storage order and not empty."""
        self._run_kernel(args, args[0][0])
        mark_written(args[0])

    def _is_tensor_list(self, at: int) -> bool:
        return self.spec.parameters[at].kind == "tensors"

    def _in_storage_order(self, args: Tuple[Any, ...]) -> Tuple[Tuple[Any, ...], List[Tuple[torch.Tensor, torch.Tensor]]]:
        """Replace tensors whose elements do not correspond in storage order to their parameter's."""
        copies: List[Tuple[torch.Tensor, torch.Tensor]] = []
        aligned = {at: list(value) for at, value in enumerate(args) if self._is_tensor_list(at)}
        names = {parameter.name: at for at, parameter in enumerate(self.spec.parameters)}
        for i, param in enumerate(aligned[0]):
            layout = param
            if not is_dense(param):
                layout = param.contiguous()
                aligned[0][i] = layout
                copies.append((param, layout))
            for name in ("grads", *_STATES):
                tensors = aligned[names[name]]
                if tensors and not same_storage_order(tensors[i], layout.stride()):
                    original = tensors[i]
                    tensors[i] = torch.empty_like(layout, dtype=original.dtype).copy_(original)
                    if name != "grads":
                        copies.append((original, tensors[i]))
        return tuple(aligned.get(at, value) for at, value in enumerate(args)), copies


class StepBatch:
    """Parameters and states that an optimizer updates together again and again: checked in full once, and then at a glance.

    Full checks take longer than the step of many small tensors. So after them, only what can change behind the batch's back is
    compared: the parameters' data by `is_current`, gradients by `step`.

    Args:
        op: `STEP_32BIT` or `STEP_8BIT`.
        params: the parameters.
        states: the op's arguments between `grads` and `algorithm`. They belong to the caller, who makes a new batch when it
            replaces one, or when its hyperparameters need other states.
        blocksize: of 8-bit states.
    """

    def __init__(
        self, op: OptimizerStep, params: List[torch.Tensor], states: Sequence[Any], blocksize: int = OPTIMIZER_BLOCKSIZE
    ) -> None:
        self._op = op
        self._params = params
        self._states = tuple(states)
        self._tail = (blocksize,) if op is STEP_8BIT else ()
        self._own = [Layouts(tensors) for tensors in (params, states[0]) if tensors]
        self._grads: Optional[Layouts] = None

    def is_current(self) -> bool:
        """Say whether parameters have the layout that they had, and states are on their device still; without, make a new batch."""
        return all(layouts.hold_for(tensors) for layouts, tensors in zip(self._own, (self._params, self._states[0])))

    def step(self, grads: List[torch.Tensor], algorithm: str, hyperparameters: Hyperparameters, step: Number, lr: Number) -> None:
        """Update the parameters, which are as `is_current` wants them. The arguments are the op's.

        Raises:
            InvalidArgumentError: as the op.
        """
        args = (self._params, grads, *self._states, algorithm, hyperparameters, step, lr, *self._tail)
        if not ordinary_execution():  # what a graph is made from has nothing to do with the next step
            self._op(*args)
        elif self._grads is not None and self._grads.hold_for(grads):
            self._op.run_checked(*args)
        else:
            self._op(*args)
            self._grads = Layouts(grads) if self._is_direct(grads) else None

    def _is_direct(self, grads: List[torch.Tensor]) -> bool:
        """Say whether kernels can take the tensors as they are, without copies and without torch's dispatcher."""
        aligned = [tensors for tensors in (grads, *self._states[:3]) if tensors]
        if not (is_plain(self._params) and all(map(is_plain, aligned))):
            return False
        return all(
            param.numel() and is_dense(param) and all(same_storage_order(tensors[i], param.stride()) for tensors in aligned)
            for i, param in enumerate(self._params)
        )


def is_dense(tensor: torch.Tensor) -> bool:
    """Say whether the tensor's elements fill consecutive storage without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def storage_strides(tensor: torch.Tensor) -> Tuple[int, ...]:
    """Return the strides of the dense tensor that kernels see: the tensor's own, or those of a contiguous copy."""
    return tensor.stride() if is_dense(tensor) else contiguous_strides(tensor.shape)


def same_storage_order(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """Say whether a tensor has its elements in the same order in storage as a dense one of its shape with these strides."""
    return tensor.stride() == strides or all(x == y for x, y, size in zip(tensor.stride(), strides, tensor.shape) if size != 1)


def _check_lists(op: str, params: Tensors, grads: Tensors, states: Sequence[Tensors], dtype: torch.dtype) -> None:
    if len(grads) != len(params):
        raise InvalidArgumentError(f"{op}: {len(params)} params and {len(grads)} grads; give one gradient for each parameter")
    for param, grad in zip(params, grads):
        checks.require_float(op, "a parameter", param)
        if checks.is_expanded(param):
            raise InvalidArgumentError(
                f"{op}: a parameter of shape {list(param.shape)} and strides {list(param.stride())} is expanded, so that elements "
                "share memory; use `param.clone()`"
            )
        if param.dtype != params[0].dtype or grad.dtype != params[0].dtype:
            raise InvalidArgumentError(
                f"{op}: dtypes {params[0].dtype}, {param.dtype} (parameter) and {grad.dtype} (gradient) in one call; "
                "all must be equal: group parameters by dtype and cast gradients"
            )
        if grad.shape != param.shape:
            raise InvalidArgumentError(f"{op}: a gradient has shape {list(grad.shape)}, its parameter {list(param.shape)}")
    for name, state in zip(_STATES, states):
        if state and len(state) != len(params):
            raise InvalidArgumentError(f"{op}: {len(params)} params and {len(state)} tensors in {name}; give one each, or none")
        for tensor, param in zip(state, params):
            checks.require_dtype(op, name, tensor, dtype)
            if tensor.shape != param.shape:
                raise InvalidArgumentError(f"{op}: {name} has shape {list(tensor.shape)}, its parameter {list(param.shape)}")


def _condition(state: Optional[str]) -> Union[str, bool]:
    """Read off an entry of `ALGORITHMS` whether there is that state: always, never, or if a hyperparameter is set."""
    if state is None or "(" not in state:
        return state is not None
    return state[state.index("(") + 1 : -1]


_CONDITIONS = {name: tuple(_condition(state) for state in states) for name, (*states, _) in ALGORITHMS.items()}


def required_states(algorithm: str, hyperparameters: Hyperparameters) -> Tuple[bool, bool, bool]:
    """Say which of the three state lists an algorithm uses with these hyperparameters.

    Raises:
        InvalidArgumentError: there is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise InvalidArgumentError(f"no optimizer algorithm {algorithm!r}; the algorithms are {', '.join(ALGORITHMS)}")
    first, second, third = (
        condition if isinstance(condition, bool) else bool(getattr(hyperparameters, condition))
        for condition in _CONDITIONS[algorithm]
    )
    return first, second, third


def _check_states_given(
    op: str, algorithm: str, hyperparameters: Hyperparameters, params: Tensors, states: Sequence[Tensors]
) -> None:
    for name, needed, state in zip(_STATES, required_states(algorithm, hyperparameters), states):
        if needed != bool(state) and params:
            raise InvalidArgumentError(f"{op}: {algorithm!r} with {hyperparameters} {'needs' if needed else 'has no'} {name}")


def _check_number(op: str, name: str, value: Number) -> None:
    if isinstance(value, torch.Tensor) and (value.dtype != torch.float32 or value.dim() != 0):
        raise InvalidArgumentError(
            f"{op}: {name} is a {value.dtype} tensor of shape {list(value.shape)}; it must be float32 with no dimension"
        )
    if name == "step" and not isinstance(value, torch.Tensor) and value < 1:
        raise InvalidArgumentError(f"{op}: step is {value}; it counts from 1")


def _step_32bit_meta(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
) -> Sequence[Output]:
    op = "optimizer_step_32bit_"
    states = (state1, state2, state3)
    _check_states_given(op, algorithm, hyperparameters, params, states)
    _check_lists(op, params, grads, states, torch.float32)
    _check_number(op, "step", step)
    _check_number(op, "lr", lr)
    return ()


def _step_8bit_meta(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    absmax3: Tensors,
    codebook1: Optional[torch.Tensor],
    codebook2: Optional[torch.Tensor],
    codebook3: Optional[torch.Tensor],
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
    blocksize: int,
) -> Sequence[Output]:
    op = "optimizer_step_8bit_blockwise_"
    states = (state1, state2, state3)
    checks.require_blocksize(op, blocksize)
    _check_states_given(op, algorithm, hyperparameters, params, states)
    _check_lists(op, params, grads, states, torch.uint8)
    for state, scales, codebook in zip(states, (absmax1, absmax2, absmax3), (codebook1, codebook2, codebook3)):
        if not state:
            continue
        if codebook is None:
            raise InvalidArgumentError(f"{op}: a state without its codebook; give one codebook for each state that is used")
        checks.require_codebook(op, codebook, 256)
        if len(scales) != len(params):
            raise InvalidArgumentError(f"{op}: {len(params)} params and {len(scales)} tensors of absmax; give one for each state")
        for tensor, param in zip(scales, params):
            checks.require_block_scales(op, tensor, checks.ceil_div(param.numel(), blocksize))
    _check_number(op, "step", step)
    _check_number(op, "lr", lr)
    return ()


STEP_32BIT = OptimizerStep("optimizer_step_32bit_", _step_32bit_meta)
STEP_8BIT = OptimizerStep("optimizer_step_8bit_blockwise_", _step_8bit_meta)


def optimizer_step_32bit_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
) -> None:
    """Update parameters in place with float32 states.

    Args:
        params: float32, float16 or bfloat16 tensors, one dtype and one device in a call, any strides.
        grads: their gradients, in the same dtype.
        state1, state2, state3: float32 tensors of the parameters' shapes; an empty list where the algorithm has no such state.
        algorithm: a key of `bnb_core.ops.spec.ALGORITHMS`.
        hyperparameters: see `bnb_core.ops.spec.Hyperparameters`.
        step: 1 at the first step; an int, or a float32 tensor without dimensions on the parameters' device.
        lr: learning rate; a float, or such a tensor.

    Raises:
        InvalidArgumentError: lists, dtypes, shapes or an algorithm that do not fit together.
    """
    STEP_32BIT(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr)


def optimizer_step_8bit_blockwise_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    absmax3: Tensors,
    codebook1: Optional[torch.Tensor],
    codebook2: Optional[torch.Tensor],
    codebook3: Optional[torch.Tensor],
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
    blocksize: int = OPTIMIZER_BLOCKSIZE,
) -> None:
    """Update parameters in place with blockwise 8-bit states (arXiv 2110.02861).

    Args:
        params, grads, algorithm, hyperparameters, step, lr: as in `optimizer_step_32bit_`.
        state1, state2, state3: uint8 codes in the parameters' shapes, blocks running in storage order.
        absmax1, absmax2, absmax3: float32 [ceil(n / blocksize)] for each state tensor.
        codebook1, codebook2, codebook3: float32 [256] for each state that is used, else None.
        blocksize: elements that share a scale.

    Raises:
        InvalidArgumentError: lists, dtypes, shapes or an algorithm that do not fit together.
    """
    STEP_8BIT(
        params,
        grads,
        state1,
        state2,
        state3,
        absmax1,
        absmax2,
        absmax3,
        codebook1,
        codebook2,
        codebook3,
        algorithm,
        hyperparameters,
        step,
        lr,
        blocksize,
    )
