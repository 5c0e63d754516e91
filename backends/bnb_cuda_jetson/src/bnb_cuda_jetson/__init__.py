"""The CUDA backend: kernels for NVIDIA Jetson Xavier, Orin and Thor."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

from bnb_core.backends import Backend, hookimpl
from bnb_core.backends.tuning import Tuning
from bnb_cuda_jetson.availability import available, describe

__version__ = "0.1.0"

backend = Backend("jetson", api_version=(1, 0), priority=100, available=available, description=describe)

# The kernels register themselves on `backend`.
from bnb_cuda_jetson import blockwise, embedding, four_bit, gemm_4bit, int8, optimizer  # noqa: E402
from bnb_cuda_jetson.errors import CudaError  # noqa: E402

__all__ = ["CudaError", "backend", "blockwise", "embedding", "four_bit", "gemm_4bit", "int8", "optimizer"]


@hookimpl
def bnb_backends() -> List[Backend]:
    """Provide the backend."""
    return [backend]


@hookimpl
def bnb_tune(device: Optional[str], shapes: Sequence[Tuple[int, int]]) -> Tuning:
    """Provide what `bnb tune` measures."""
    from bnb_cuda_jetson import tuning

    return tuning.tuning(device, shapes)
