"""How the states of a sharded parameter are sharded: as the parameter is, whatever the number of processes.

A state has the parameter's shape, and its placements. For 8-bit codes the absmax must be sharded with them, and a block that two
processes had a part of would have no absmax to give to either. So blocks lie within what the sharding never cuts: the elements of
a parameter that have equal indices up to its last sharded dimension, `run` of them. For FSDP's `Shard(0)` these are the rows. A
block is the largest part of a run, up to 256 elements, that divides it; absmax has the leading dimensions of the parameter, and
another one for the blocks of a run. So codes and absmax can be cut between any two rows and be put together again, to the bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Tuple

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.checks import ceil_div
from bnb_core.ops.sharded import is_sharded, local_part, with_part
from bnb_core.ops.spec import OPTIMIZER_BLOCKSIZE

#: Shorter blocks than this would have more bytes of absmax than half of those of their codes.
_SHORTEST_BLOCK = 8


class Blocks(NamedTuple):
    """The blocks of a parameter's 8-bit states."""

    size: int
    """Elements that share an absmax."""
    shape: Tuple[int, ...]
    """Shape of absmax."""
    local_shape: Tuple[int, ...]
    """Shape of what this process has of it."""


def blocks_of(param: torch.Tensor) -> Optional[Blocks]:
    """Return the blocks of a parameter's 8-bit states; None if it is sharded so that it can only have 32-bit ones."""
    split = 1 + max(_sharded_dimensions(param), default=-1)
    if not split:
        blocks = (ceil_div(param.numel(), OPTIMIZER_BLOCKSIZE),)
        return Blocks(OPTIMIZER_BLOCKSIZE, blocks, blocks)
    run, local = math.prod(param.shape[split:]), local_part(param)
    size = max((size for size in range(1, OPTIMIZER_BLOCKSIZE + 1) if run % size == 0), default=0) if run else 0
    if size < _SHORTEST_BLOCK or not local.is_contiguous():
        return None
    return Blocks(size, (*param.shape[:split], run // size), (*local.shape[:split], run // size))


def shard_like(param: torch.Tensor, part: torch.Tensor, shape: Tuple[int, ...], halves: bool) -> torch.Tensor:
    """Return the tensor that is sharded as its parameter is, and has this part in this process.

    Args:
        param: the parameter. If it is not sharded, `part` is returned as it is.
        part: what this process has; its memory is shared.
        shape: of the whole.
        halves: whether there is a dimension before those of the parameter.
    """
    if not is_sharded(param):
        return part
    return with_part(part, param, shape, placements_like(param, halves))


def placements_like(param: Any, halves: bool) -> Tuple[Any, ...]:
    """Return the placements of a sharded parameter's states, with or without another dimension before those of the parameter."""
    if not halves:
        return tuple(param.placements)
    return tuple(_next_dimension(placement) if hasattr(placement, "dim") else placement for placement in param.placements)


def is_sharded_like(param: torch.Tensor, tensor: torch.Tensor, halves: bool) -> bool:
    """Say whether a state is sharded as its parameter is, or neither is."""
    if not is_sharded(param) or not is_sharded(tensor):
        return is_sharded(param) == is_sharded(tensor)
    of_param: Any = param
    of_state: Any = tensor
    return of_state.device_mesh == of_param.device_mesh and tuple(of_state.placements) == placements_like(param, halves)


def local_gradient(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient of what this process has of a parameter.

    All processes must call this for the same parameters in the same order: a gradient that is sharded in another way than its
    parameter, or not summed up yet, is brought into the parameter's placements.
    """
    if is_sharded(grad):
        sharded: Any = param
        gradient: Any = grad
        if gradient.placements != sharded.placements:
            grad = gradient.redistribute(sharded.device_mesh, sharded.placements)
    return local_part(grad)


def require_local_norm(optimizer: str, param: torch.Tensor, max_unorm: float) -> None:
    """Refuse a limit that depends on the norm of all of a parameter, where a process has only a part.

    Raises:
        InvalidArgumentError: saying what to do.
    """
    if max_unorm > 0.0 and _is_cut(param):
        raise InvalidArgumentError(
            f"{optimizer}: max_unorm is {max_unorm} for a sharded parameter of shape {list(param.shape)}, whose norm no process "
            "knows; use max_unorm=0, or DistributedDataParallel, which leaves parameters whole"
        )


def _is_cut(param: Any) -> bool:
    """Say whether several processes have a part each, at least of a parameter that is large enough."""
    if not is_sharded(param):
        return False
    return any(hasattr(placement, "dim") and param.device_mesh.size(at) > 1 for at, placement in enumerate(param.placements))


def _sharded_dimensions(param: torch.Tensor) -> Tuple[int, ...]:
    placements = getattr(param, "placements", ()) if is_sharded(param) else ()
    return tuple(placement.dim % param.dim() for placement in placements if hasattr(placement, "dim"))


def _next_dimension(placement: Any) -> Any:
    if hasattr(placement, "split_factor"):  # FSDP over tensor parallelism, both on one dimension
        return type(placement)(placement.dim + 1, split_factor=placement.split_factor)
    return type(placement)(placement.dim + 1)
