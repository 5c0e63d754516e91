"""Functions on tensors: those of `bnb_core.functional`, and stand-ins for those that only bitsandbytes' C library has."""

import ctypes
from typing import Iterable, Optional

import torch

from bitsandbytes.cextension import lib, not_provided
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from bnb_core import functional
from bnb_core.errors import InvalidArgumentError
from bnb_core.functional import *  # noqa: F403

#: The largest code of int8 quantization.
C = 127.0
FIRST_CUDA_DEVICE = torch.device("cuda", index=0)

_PAGED = "use a paged optimizer, such as bnb_core.optim.PagedAdamW8bit"
_INT8 = "use int8_linear_matmul"
_STEP = "use a class of bnb_core.optim"

get_paged = not_provided("functional.get_paged", _PAGED)
prefetch_tensor = not_provided("functional.prefetch_tensor", _PAGED)
elementwise_func = not_provided("functional.elementwise_func", "use torch")
fill = not_provided("functional.fill", "use torch.Tensor.fill_")
check_matmul = not_provided("functional.check_matmul", _INT8)
igemm = not_provided("functional.igemm", _INT8)
batched_igemm = not_provided("functional.batched_igemm", _INT8)
optimizer_update_32bit = not_provided("functional.optimizer_update_32bit", _STEP)
optimizer_update_8bit_blockwise = not_provided("functional.optimizer_update_8bit_blockwise", _STEP)


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


def has_avx512bf16() -> bool:
    """Return False: no weight is repacked for CPUs that have these instructions."""
    return False


__all__ = [
    *functional.__all__,
    "FIRST_CUDA_DEVICE",
    "C",
    "batched_igemm",
    "check_matmul",
    "elementwise_func",
    "fill",
    "get_paged",
    "get_ptr",
    "has_avx512bf16",
    "igemm",
    "is_on_gpu",
    "lib",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "unpack_tensor_to_dict",
]
