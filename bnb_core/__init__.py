"""8-bit optimizers, LLM.int8() and NF4/FP4 quantization for PyTorch, on backends chosen at run time.

Importing this package loads no backend, touches no device and does not import torch: every name is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from bnb_core import autograd, backends, functional, nn, ops, optim, utils
    from bnb_core.backends import get_backend, list_backends, set_backend, use_backend
    from bnb_core.errors import BnbError
    from bnb_core.integrations.model import dequantize_model, quantize_model
    from bnb_core.integrations.saved_model import load_quantized, save_quantized
    from bnb_core.integrations.streaming import quantize_checkpoint
    from bnb_core.quantization import MatmulLtState, QuantState, matmul, matmul_4bit

__version__ = "0.1.0"

_SUBMODULES = ("autograd", "backends", "errors", "functional", "nn", "ops", "optim", "quantization", "testing", "utils")
_ORIGINS = {
    "BnbError": "errors",
    "MatmulLtState": "quantization",
    "QuantState": "quantization",
    "dequantize_model": "integrations.model",
    "get_backend": "backends",
    "list_backends": "backends",
    "load_quantized": "integrations.saved_model",
    "matmul": "quantization",
    "matmul_4bit": "quantization",
    "quantize_checkpoint": "integrations.streaming",
    "quantize_model": "integrations.model",
    "save_quantized": "integrations.saved_model",
    "set_backend": "backends",
    "use_backend": "backends",
}

__all__ = [
    "BnbError",
    "MatmulLtState",
    "QuantState",
    "__version__",
    "autograd",
    "backends",
    "dequantize_model",
    "functional",
    "get_backend",
    "list_backends",
    "load_quantized",
    "matmul",
    "matmul_4bit",
    "nn",
    "ops",
    "optim",
    "quantize_checkpoint",
    "quantize_model",
    "save_quantized",
    "set_backend",
    "use_backend",
    "utils",
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
