"""Gather what a step updates into as few calls as can be, and keep that while nothing but gradients and options changes."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch

from bnb_core.ops.optimizer import Number, StepBatch
from bnb_core.ops.plain import ordinary_execution
from bnb_core.ops.sharded import is_sharded, local_part
from bnb_core.ops.spec import Hyperparameters
from bnb_core.optim.manager import GlobalOptimManager
from bnb_core.optim.sharding import blocks_of, local_gradient, require_local_norm
from bnb_core.optim.state_formats import FORMATS, Slots, State, StateFormat, format_of

if TYPE_CHECKING:
    from bnb_core.optim.optimizer import Optimizer

_END = object()

#: Options that `GlobalOptimManager` sets for some parameters, in place of their group's.
Override = Optional[Dict[str, Any]]


class _Member(NamedTuple):
    """A parameter that is updated."""

    place: int
    """Among all parameters of the optimizer."""
    param: torch.Tensor
    state: State
    group: int
    override: Override
    slots: Slots
    format: StateFormat
    blocksize: int
    """Of 8-bit states."""

    def key(self) -> Tuple[Any, ...]:
        """Return what has to be equal in parameters that one call updates."""
        common = self.format.common(self.state, self.slots)
        tensor = (self.param.device, self.param.dtype, is_sharded(self.param), local_part(self.param).numel() == 0)
        return (self.group, id(self.override), self.format.op, self.blocksize, *tensor, id(self.state["step"]), *common)


class Call(NamedTuple):
    """One call of this step."""

    batch: StepBatch
    grads: List[torch.Tensor]
    hyperparameters: Hyperparameters
    step: torch.Tensor
    lr: Number
    device: torch.device
    on_device: bool
    """Whether the step count stays on the device, because a number would be captured, or cannot be read."""

    def run(self, algorithm: str) -> None:
        """Update the parameters."""
        step = self.step.to(self.device) if self.on_device else int(self.step)
        lr = self.lr.to(self.device, torch.float32).reshape(()) if isinstance(self.lr, torch.Tensor) else float(self.lr)
        self.batch.step(self.grads, algorithm, self.hyperparameters, step, lr)


class _Bucket:
    """Parameters that one call updates."""

    def __init__(self, members: List[_Member]) -> None:
        first = members[0]
        self.group = first.group
        self.override = first.override
        self.slots = first.slots
        self.step: torch.Tensor = first.state["step"]
        self.device = first.param.device
        self.places = [member.place for member in members]
        states = [member.state for member in members]
        #: Those of which a process has only a part, and these parts: sharding may put others in their place.
        self._sharded = [member.param for member in members if is_sharded(member.param)]
        params = [local_part(member.param) for member in members]
        self._parts = [param.data_ptr() for param in params] if self._sharded else []
        self.batch = StepBatch(first.format.op, params, first.format.arguments(states, first.slots), first.blocksize)

    def is_current(self) -> bool:
        """Say whether parameters are as they were, and states where they were."""
        return self.batch.is_current() and [local_part(param).data_ptr() for param in self._sharded] == self._parts


class Plan:
    """The calls of a step, for the parameters that have a gradient now.

    Making one creates the states that are missing, and brings those that are there to where their parameter is.

    Raises:
        InvalidArgumentError: options that an optimizer does not take.
    """

    def __init__(self, optimizer: "Optimizer") -> None:
        manager = GlobalOptimManager.get_instance()
        self._changes = manager.changes
        self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._capturable = [bool(group["capturable"]) for group in optimizer.param_groups]
        self._params = [param for group in optimizer.param_groups for param in group["params"]]
        self._idle = [param.grad is None for param in self._params]
        self._sharded = any(map(is_sharded, self._params))
        members = list(_members(optimizer, manager.overrides()))
        capturable = [optimizer.param_groups[member.group]["capturable"] for member in members]
        share_steps(
            [(member.state, member.param.device if on_device else None) for member, on_device in zip(members, capturable)],
            optimizer.state.values(),
        )
        #: Whose states there are, and what is in them: the tensors that batches are made of, and whatever else.
        self._stateful = list(optimizer.state)
        self._contents = list(_contents(optimizer))
        buckets: Dict[Tuple[Any, ...], List[_Member]] = {}
        for member in members:
            buckets.setdefault(member.key(), []).append(member)
        self._buckets = [_Bucket(bucket) for bucket in buckets.values()]
        #: The step counts, each once.
        self.steps = list({id(bucket.step): bucket.step for bucket in self._buckets}.values())

    def calls(self, optimizer: "Optimizer") -> Optional[List[Call]]:
        """Return the calls of this step; None where something has changed since the plan was made."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        if (
            self._sizes != [len(group["params"]) for group in optimizer.param_groups]
            or not all(map(is_, params, self._params))
            or self._idle != [grad is None for grad in grads]
            or self._capturable != [bool(group["capturable"]) for group in optimizer.param_groups]
            or self._changes != GlobalOptimManager.get_instance().changes
            or len(optimizer.state) != len(self._stateful)
            or not all(map(is_, optimizer.state, self._stateful))
            or not all(map(is_, _contents(optimizer), self._contents))
            or not all(bucket.is_current() for bucket in self._buckets)
        ):
            return None
        if self._sharded:
            # In the order of the parameters, which is that of the other processes too; that of the buckets may not be.
            grads = [grad if grad is None else local_gradient(param, grad) for param, grad in zip(params, grads)]
        readable = ordinary_execution()
        calls: List[Call] = []
        for bucket in self._buckets:
            options = optimizer.options(optimizer.param_groups[bucket.group], bucket.override)
            hyperparameters = optimizer.rules.hyperparameters(options)
            if optimizer.rules.slots_for(hyperparameters) != bucket.slots:
                return None
            gradients = [grads[place] for place in bucket.places]
            on_device = self._capturable[bucket.group] or not readable
            calls.append(Call(bucket.batch, gradients, hyperparameters, bucket.step, options["lr"], bucket.device, on_device))
        return calls


def _contents(optimizer: "Optimizer") -> Iterable[Any]:
    """List all that states hold, and an end by which a longer list differs from a shorter one."""
    return chain(chain.from_iterable(map(dict.values, optimizer.state.values())), (_END,))


def _members(optimizer: "Optimizer", overrides: Dict[int, Dict[str, Any]]) -> Iterable[_Member]:
    """List what is updated, with its states made ready."""
    place = -1
    for index, group in enumerate(optimizer.param_groups):
        known: Dict[int, Tuple[Override, Dict[str, Any], Slots]] = {}
        for param in group["params"]:
            place += 1
            if param.grad is None or not param.numel():
                continue
            given = overrides.get(id(param))
            if id(given) not in known:
                override = None if given is None else optimizer.translate_override(given)
                options = optimizer.options(group, override)
                optimizer.check(options)
                known[id(given)] = override, options, optimizer.rules.slots_for(optimizer.rules.hyperparameters(options))
            override, options, slots = known[id(given)]
            require_local_norm(type(optimizer).__name__, param, options["max_unorm"])
            state, blocks = optimizer.state[param], blocks_of(param)
            small = param.numel() < options["min_8bit_size"] or blocks is None
            format = format_of(state) or FORMATS[32 if small else options["optim_bits"]]
            for slot in slots:
                if slot is not None and slot.key not in state:
                    format.add(state, slot, param, optimizer.rules.initial_value(options))
                elif slot is not None:
                    format.follow(state, slot, param)
            blocksize = blocks.size if blocks is not None and format is FORMATS[8] else 0
            yield _Member(place, param, state, index, override, slots, format, blocksize)


def share_steps(members: Iterable[Tuple[State, Optional[torch.device]]], states: Iterable[State]) -> None:
    """Give the states that are about to step together one tensor that counts their steps: float32, without dimensions.

    Args:
        members: those states, each with the device to count on. With None, which is the CPU, counts are read and compared; on a
            device they are not, and only states that had a tensor in common share one afterwards.
        states: all states of the optimizer. One that does not step keeps its tensor to itself.
    """
    holders = Counter(id(state["step"]) for state in states if "step" in state)
    together: Dict[Tuple[Any, ...], List[State]] = {}
    for state, device in members:
        step = state.setdefault("step", 0)
        compared = device is None or not isinstance(step, torch.Tensor)
        together.setdefault((device, compared, int(step) if compared else id(step)), []).append(state)
    for (device, *_), sharing in together.items():
        step = sharing[0]["step"]
        home = torch.device("cpu") if device is None else device
        if not isinstance(step, torch.Tensor):
            step = torch.tensor(float(step), device=home)
        elif (
            step.device != home
            or step.dtype != torch.float32
            or holders[id(step)] != len(sharing)
            or any(state["step"] is not step for state in sharing)
        ):
            step = step.detach().to(home, torch.float32, copy=True).reshape(())
        for state in sharing:
            state["step"] = step
