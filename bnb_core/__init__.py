"""8-bit optimizers, LLM.int8() and NF4/FP4 quantization for PyTorch, on backends chosen at run time.

Importing this package loads no backend, touches no device and does not import torch: every name is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from bnb_core import backends, functional, nn, ops, optim
    from bnb_core.backends import get_backend, list_backends, set_backend, use_backend
    from bnb_core.errors import BnbError
    from bnb_core.quantization import MatmulLtState, QuantState, matmul, matmul_4bit

__version__ = "0.1.0"

_SUBMODULES = ("backends", "errors", "functional", "nn", "ops", "optim", "quantization", "testing")
_ORIGINS = {
    "BnbError": "errors",
    "MatmulLtState": "quantization",
    "QuantState": "quantization",
    "get_backend": "backends",
    "list_backends": "backends",
    "matmul": "quantization",
    "matmul_4bit": "quantization",
    "set_backend": "backends",
    "use_backend": "backends",
}

__all__ = [
    "BnbError",
    "MatmulLtState",
    "QuantState",
    "__version__",
    "backends",
    "functional",
    "get_backend",
    "list_backends",
    "matmul",
    "matmul_4bit",
    "nn",
    "ops",
    "optim",
    "set_backend",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _ORIGINS:
        value = getattr(importlib.import_module(f"{__name__}.{_ORIGINS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> List[str]:
    return sorted(__all__)
