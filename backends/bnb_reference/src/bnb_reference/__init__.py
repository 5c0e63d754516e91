"""The reference backend: every op in plain PyTorch, written to be read."""

from __future__ import annotations

from typing import Any, Callable, Iterable, List

import torch

from bnb_core.backends import ANY_DEVICE, Backend, hookimpl

__version__ = "0.1.0"

backend = Backend("reference", api_version=(1, 0), priority=0, description="plain PyTorch")


def kernel(
    op: str, dtypes: Iterable[torch.dtype] = (torch.float32, torch.float16, torch.bfloat16)
) -> Callable[[Callable[..., None]], Any]:
    """Register the decorated function as the kernel for `op` on every device.

    It runs outside autograd: the core owns the derivatives, and torch refuses `out=` for inputs that require grad.
    """

    def register(function: Callable[..., None]) -> Any:
        return backend.kernel(op, devices={ANY_DEVICE}, dtypes=dtypes)(torch.no_grad()(function))

    return register


# The kernels register themselves on `backend`.
from bnb_reference import dequantize, embedding, int8, matmul, optimizer, quantize  # noqa: E402

__all__ = ["backend", "dequantize", "embedding", "int8", "matmul", "optimizer", "quantize"]


@hookimpl
def bnb_backends() -> List[Backend]:
    """Provide the backend."""
    return [backend]
