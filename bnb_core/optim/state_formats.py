"""How the states of one parameter are kept: as float32, or as blockwise 8-bit codes, under the names that bitsandbytes gives them.

A format makes the tensors of `optimizer.state[param]`, keeps them with their parameter where that moves, checks those that come
from a checkpoint, and lines them up for the op.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from bnb_core.errors import CheckpointError
from bnb_core.ops import dequantize_blockwise, quantize_blockwise
from bnb_core.ops.checks import ceil_div
from bnb_core.ops.optimizer import STEP_8BIT, STEP_32BIT, OptimizerStep, is_dense, same_storage_order, storage_strides
from bnb_core.ops.sharded import is_sharded, local_part
from bnb_core.ops.spec import OPTIMIZER_BLOCKSIZE
from bnb_core.optim.sharding import blocks_of, shard_like
from bnb_core.quantization.codebooks import shared_codebook

State = Dict[str, Any]


class Slot(NamedTuple):
    """Where one of the states of an algorithm is kept."""

    number: int
    """Ending of its names: 1 for state1, absmax1 and qmap1."""
    half: Optional[int] = None
    """Which half of a tensor [2, *shape] it is; None if it has a tensor of its own."""
    signed: bool = True
    """Whether its codes are those of the signed dynamic codebook, or of the unsigned one."""

    @property
    def key(self) -> str:
        """Name of its tensor."""
        return f"state{self.number}"

    def of(self, state: State, name: str) -> torch.Tensor:
        """Return this slot's part of a tensor in the state; of a sharded tensor, what this process has of it."""
        tensor = local_part(state[f"{name}{self.number}"])
        return tensor if self.half is None else tensor[self.half]


#: The states of an algorithm in the op's order, None for those that it has not.
Slots = Sequence[Optional[Slot]]


class StateFormat:
    """What the formats have in common: a tensor for each slot, with its elements in the parameter's order of storage."""

    title: str
    dtype: torch.dtype
    #: What the tensors of a slot are called, before its number.
    names: Tuple[str, ...]
    op: OptimizerStep

    def add(self, state: State, slot: Slot, param: torch.Tensor, initial: float) -> None:
        """Make the tensors of a slot, or of both slots that share them, with all values `initial`."""
        raise NotImplementedError

    def reorder(self, state: State, slot: Slot, param: torch.Tensor) -> None:
        """Bring the tensor of a slot, or of both slots that share it, into the parameter's order of storage."""
        raise NotImplementedError

    def common(self, state: State, slots: Slots) -> Tuple[int, ...]:
        """Return what has to be equal in the states of parameters that one call updates."""
        raise NotImplementedError

    def arguments(self, states: Sequence[State], slots: Slots) -> List[Any]:
        """Return the op's arguments between `grads` and `algorithm`."""
        raise NotImplementedError

    def follow(self, state: State, slot: Slot, param: torch.Tensor) -> None:
        """Move a slot's tensors to where the parameter is, and into its order of storage."""
        for name in self.names:
            key = f"{name}{slot.number}"
            if state[key].device != param.device:
                moved = state[key].to(param.device)
                state[key] = interned_codebook(moved) if name == "qmap" else moved
        # A part of a sharded parameter has its states in the order that they were made in, which other processes go by too.
        if not is_sharded(param) and not same_storage_order(slot.of(state, "state"), storage_strides(param)):
            self.reorder(state, slot, param)

    def check(self, state: State, slot: Slot, param: torch.Tensor) -> None:
        """Refuse a state from a checkpoint that does not fit its parameter.

        Raises:
            CheckpointError: a tensor is missing, or has another shape or dtype.
        """
        halves = () if slot.half is None else (2,)
        blocks = blocks_of(param)
        expected = {
            "state": (self.dtype, (*halves, *param.shape)),
            "absmax": (torch.float32, (*halves, *(blocks.shape if blocks else (ceil_div(param.numel(), OPTIMIZER_BLOCKSIZE),)))),
            "qmap": (torch.float32, (256,)),
        }
        for name in self.names:
            key, (dtype, shape) = f"{name}{slot.number}", expected[name]
            tensor = state.get(key)
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != shape:
                found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else repr(tensor)
                raise CheckpointError(
                    f"optimizer state: {key} is {found}; a parameter of shape {list(param.shape)} with {self.title} needs "
                    f"{dtype} {list(shape)}. Is the checkpoint that of this model and algorithm?"
                )


class Float32Format(StateFormat):
    """States in float32."""

    title = "32-bit states"
    dtype = torch.float32
    names = ("state",)
    op = STEP_32BIT

    def add(self, state: State, slot: Slot, param: torch.Tensor, initial: float) -> None:
        """Make the tensor of a slot, or of both slots that share it, with all values `initial`."""
        state[slot.key] = _sharded_state(param, _empty_state(param, self.dtype, slot).fill_(initial), slot)

    def reorder(self, state: State, slot: Slot, param: torch.Tensor) -> None:
        """Copy."""
        state[slot.key] = _empty_state(param, self.dtype, slot).copy_(state[slot.key])

    def common(self, state: State, slots: Slots) -> Tuple[int, ...]:
        """Return nothing: all may be updated together."""
        return ()

    def arguments(self, states: Sequence[State], slots: Slots) -> List[Any]:
        """Return the op's arguments between `grads` and `algorithm`."""
        return _lists("state", states, slots)


class Blockwise8bitFormat(StateFormat):
    """States in 8-bit codes (arXiv 2110.02861): blocks of 256 elements in the order of storage, with an absmax each."""

    title = "8-bit states"
    dtype = torch.uint8
    names = ("state", "absmax", "qmap")
    op = STEP_8BIT

    def add(self, state: State, slot: Slot, param: torch.Tensor, initial: float) -> None:
        """Make the tensors of a slot, or of both slots that share them, with all values `initial`."""
        blocks = blocks_of(param)
        assert blocks is not None
        halves = () if slot.half is None else (2,)
        absmax = torch.full((*halves, *blocks.local_shape), initial, dtype=torch.float32, device=param.device)
        # The last code of either codebook stands for 1.
        state[slot.key] = _sharded_state(param, _empty_state(param, self.dtype, slot).fill_(255 if initial else 0), slot)
        state[f"absmax{slot.number}"] = shard_like(param, absmax, (*halves, *blocks.shape), bool(halves))
        state[f"qmap{slot.number}"] = shared_codebook("dynamic" if slot.signed else "udynamic", param.device, 256)

    def reorder(self, state: State, slot: Slot, param: torch.Tensor) -> None:
        """Quantize again, because other elements come to share a block."""
        codebook = state[f"qmap{slot.number}"]
        new = _empty_state(param, self.dtype, slot)
        for half in [slot] if slot.half is None else [slot._replace(half=0), slot._replace(half=1)]:
            codes, absmax = half.of(state, "state"), half.of(state, "absmax")
            codes = codes if is_dense(codes) else codes.contiguous()
            values = dequantize_blockwise(_flat(codes), absmax, codebook, OPTIMIZER_BLOCKSIZE, torch.float32)
            reordered = torch.empty_strided(param.shape, storage_strides(param), device=param.device)
            reordered.copy_(values.as_strided(codes.shape, codes.stride()))
            target = _flat(half.of({slot.key: new}, "state"))
            quantize_blockwise(_flat(reordered), codebook, OPTIMIZER_BLOCKSIZE, out=(target, absmax))
        state[slot.key] = new

    def common(self, state: State, slots: Slots) -> Tuple[int, ...]:
        """Return the codebooks, of which a call takes one for all parameters."""
        return tuple(id(state[f"qmap{slot.number}"]) for slot in slots if slot is not None)

    def arguments(self, states: Sequence[State], slots: Slots) -> List[Any]:
        """Return the op's arguments between `grads` and `algorithm`."""
        codebooks = [None if slot is None else states[0][f"qmap{slot.number}"] for slot in slots]
        absmax = [[scales.view(-1) for scales in of_slot] for of_slot in _lists("absmax", states, slots)]
        return [*_lists("state", states, slots), *absmax, *codebooks]


def _lists(name: str, states: Sequence[State], slots: Slots) -> List[Any]:
    return [[] if slot is None else [slot.of(state, name) for state in states] for slot in slots]


#: The formats by `optim_bits`.
FORMATS: Dict[int, StateFormat] = {32: Float32Format(), 8: Blockwise8bitFormat()}

#: Names of all tensors that a format keeps. A checkpoint sets them apart, and they never take on the parameter's dtype.
TENSOR_KEYS = frozenset(f"{name}{number}" for name in Blockwise8bitFormat.names for number in (1, 2, 3))


def format_of(state: State) -> Optional[StateFormat]:
    """Return the format of a state that has tensors, by their dtype; None if it has none."""
    for number in (1, 2, 3):
        tensor = state.get(f"state{number}")
        if tensor is not None:
            return FORMATS[8 if tensor.dtype == torch.uint8 else 32]
    return None


def interned_codebook(codebook: torch.Tensor) -> torch.Tensor:
    """Return the one tensor that stands for all codebooks with these values on this device."""
    for name in ("dynamic", "udynamic"):
        shared = shared_codebook(name, codebook.device, 256)
        if codebook is shared or torch.equal(codebook, shared):
            return shared
    return _other_codebooks.setdefault((codebook.cpu().numpy().tobytes(), codebook.device), codebook)


#: Codebooks of checkpoints that differ from those built here, as they do by a bit where another machine's arithmetic made them.
_other_codebooks: Dict[Tuple[bytes, torch.device], torch.Tensor] = {}


def _empty_state(param: torch.Tensor, dtype: torch.dtype, slot: Slot) -> torch.Tensor:
    """Allocate what this process has of a slot's tensor. All states are allocated here: paged memory would come in here."""
    part = local_part(param)
    shape, strides = tuple(part.shape), storage_strides(part)
    if slot.half is not None:
        shape, strides = (2, *shape), (part.numel(), *strides)
    return torch.empty_strided(shape, strides, dtype=dtype, device=part.device)


def _sharded_state(param: torch.Tensor, part: torch.Tensor, slot: Slot) -> torch.Tensor:
    shape = tuple(param.shape) if slot.half is None else (2, *param.shape)
    return shard_like(param, part, shape, slot.half is not None)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """View a dense tensor as one dimension, in the order of storage."""
    return tensor.as_strided((tensor.numel(),), (1,))
