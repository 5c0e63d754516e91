"""Tensors that are spread over processes, torch's DTensors: kernels take the part that a process has, never the whole."""

from __future__ import annotations

import sys
from typing import Any, Callable, Sequence

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.outputs import contiguous_strides


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is a DTensor. There is none before torch 2.5, nor before something has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    cls = getattr(module, "DTensor", None)
    return cls is not None and isinstance(tensor, cls)


def local_part(tensor: Any) -> torch.Tensor:
    """Return what this process has of a DTensor, sharing its memory; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local  # what a collective that is under way will have written


def with_part(part: torch.Tensor, like: Any, shape: Sequence[int], placements: Sequence[Any]) -> torch.Tensor:
    """Return the DTensor of which this process has `part`, sharing its memory.

    Args:
        part: on any device. `DTensor.from_local` would move what FSDP has offloaded to the CPU back to the GPU.
        like: a DTensor with the mesh of processes.
        shape: of the whole, which is contiguous.
        placements: how it is sharded.
    """
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    shape = torch.Size(shape)
    meta = TensorMeta(shape, contiguous_strides(shape), part.dtype)
    cls: Any = sys.modules["torch.distributed.tensor"].DTensor
    return cls(part, DTensorSpec(like.device_mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def refuse_sharded(what: str, tensors: Sequence[Any], names: Callable[[], Sequence[str]]) -> None:
    """Refuse DTensors. `names` is asked for messages only.

    Raises:
        InvalidArgumentError: naming the tensor, how it is sharded, and what to pass instead.
    """
    for at, tensor in enumerate(tensors):
        if is_sharded(tensor):
            name = names()[at]
            raise InvalidArgumentError(
                f"{what}: {name} is a DTensor with placements {tensor.placements}, and kernels see one process's memory; pass "
                f"{name}.to_local() for this process's part or {name}.full_tensor() for all of it. A module's weight is gathered "
                "by calling the module that fully_shard was applied to, or its unshard()"
            )
