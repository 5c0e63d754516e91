"""bnb_core under the name bitsandbytes: what clients of version 0.50.2 import, most of it the same objects."""

from bitsandbytes import _ops, autograd, cextension, consts, cuda_specs, functional, nn, optim, utils
from bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from bitsandbytes.nn import modules
from bitsandbytes.optim import adam

__version__ = "0.50.2"

#: transformers and accelerate look here whether a GPU other than NVIDIA's, or none, will do.
features = {"multi_backend"}
#: Types of torch devices, of which transformers wants one to be present.
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}

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
