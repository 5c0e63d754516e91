"""The backend for ARM CPUs: NEON kernels for every core from ARMv8.0 on."""

from __future__ import annotations

from typing import List

from bnb_core.backends import Backend, hookimpl
from bnb_cpu_neon.engine import __version__, backend
from bnb_cpu_neon.precision import PRECISIONS, current_precision, set_precision, use_precision

# The kernels register themselves on `backend`.
from bnb_cpu_neon import blockwise, embedding, four_bit, gemm_4bit, int8, optimizer  # isort: skip

__all__ = [
    "PRECISIONS",
    "__version__",
    "backend",
    "blockwise",
    "current_precision",
    "embedding",
    "four_bit",
    "gemm_4bit",
    "int8",
    "optimizer",
    "set_precision",
    "use_precision",
]


@hookimpl
def bnb_backends() -> List[Backend]:
    """Provide the backend."""
    return [backend]
