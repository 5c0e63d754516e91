"""Functions on tensors, and stand-ins for those that only bitsandbytes' C library has."""

from bitsandbytes.cextension import lib, not_provided
from bnb_core import functional
from bnb_core.functional import *  # noqa: F403

_PAGED = "use a paged optimizer, such as bnb_core.optim.PagedAdamW8bit"
_INT8 = "use int8_linear_matmul"

CUBLAS_Context = not_provided("functional.CUBLAS_Context", _INT8)
GlobalPageManager = not_provided("functional.GlobalPageManager", _PAGED)
get_paged = not_provided("functional.get_paged", _PAGED)
prefetch_tensor = not_provided("functional.prefetch_tensor", _PAGED)
elementwise_func = not_provided("functional.elementwise_func", "use torch")
fill = not_provided("functional.fill", "use torch.Tensor.fill_")
check_matmul = not_provided("functional.check_matmul", _INT8)
igemm = not_provided("functional.igemm", _INT8)
batched_igemm = not_provided("functional.batched_igemm", _INT8)

__all__ = [
    *functional.__all__,
    "CUBLAS_Context",
    "GlobalPageManager",
    "batched_igemm",
    "check_matmul",
    "elementwise_func",
    "fill",
    "get_paged",
    "igemm",
    "lib",
    "prefetch_tensor",
]
