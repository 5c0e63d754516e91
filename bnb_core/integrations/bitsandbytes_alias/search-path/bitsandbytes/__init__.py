"""bnb_core under the name bitsandbytes: what clients of version 0.50.2 import, most of it the same objects."""

from typing import Set

from bitsandbytes import _features, _ops, autograd, cextension, consts, cuda_specs, functional, nn, optim, utils
from bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from bitsandbytes.nn import modules
from bitsandbytes.optim import adam

__version__ = "0.50.2"

#: Types of torch devices, of which transformers wants one to be present.
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}


def __getattr__(name: str) -> Set[str]:
    if name == "features":  # at the moment when a client asks
        return _features.features()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MatmulLtState",
    "__version__",
    "_ops",
    "adam",
    "autograd",
    "cextension",
    "consts",
    "cuda_specs",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "supported_torch_devices",
    "utils",
]
