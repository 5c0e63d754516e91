"""Where the elements of tensors are: their device, and their address."""

from __future__ import annotations

import ctypes
from typing import Iterable, Optional

import torch

from bnb_core.errors import InvalidArgumentError


def get_ptr(A: Optional[torch.Tensor]) -> Optional[ctypes.c_void_p]:
    """Return the address of a tensor's data; None of None."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Iterable[Optional[torch.Tensor]]) -> bool:
    """Return True if all tensors, other than None, are on one device, which may be the CPU.

    Raises:
        InvalidArgumentError: they are on several.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise InvalidArgumentError(f"is_on_gpu: tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")
    return True


def sync_gpu(t: torch.Tensor) -> None:
    """Wait for the work that is queued on the GPU that holds a tensor; on a CPU there is none."""
    if t.device.type in ("cuda", "xpu"):
        getattr(torch, t.device.type).synchronize(t.device)
