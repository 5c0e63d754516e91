"""What every kernel's glue needs: how kernels are registered, torch's current stream, and arguments as addresses."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional, Tuple

import torch

from bnb_core.backends import Call
from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import backend

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

#: Numbers by which the native entry points know dtypes; the same as in native/host/arguments.h.
DTYPES = {dtype: number for number, dtype in enumerate(FLOATS)}

#: Return the address of torch's current stream on a device. Builds of torch without CUDA have none, and no CUDA tensors either.
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

#: The addresses and the blocksize of nested statistics where there are none.
NOT_NESTED = (0, 0, 0, 1)


def kernel(
    op: str, dtypes: Iterable[torch.dtype] = FLOATS, scratch: Optional[Callable[[Call], int]] = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function as the kernel for `op` on CUDA devices."""
    return backend.kernel(op, devices={"cuda"}, dtypes=dtypes, scratch=scratch)


def nested_addresses(nested: Optional[Nested]) -> Tuple[int, int, int, int]:
    """Return the addresses of nested statistics and their blocksize."""
    if nested is None:
        return NOT_NESTED
    return nested.absmax.data_ptr(), nested.codebook.data_ptr(), nested.offset.data_ptr(), nested.blocksize


def address(tensor: Optional[Any]) -> int:
    """Return a tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
