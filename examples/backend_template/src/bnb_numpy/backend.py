"""What the backend is called, where it runs, and which kernel it has for which op."""

import torch

from bnb_core.backends import YES, Backend, Support, hookimpl
from bnb_numpy import kernels

#: The most temporary memory that a kernel may ask for.
MAX_SCRATCH = 32 << 20


def _available():
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:  # torch was built without numpy, or for another major version of it
        return Support(False, f"torch cannot pass tensors to numpy: {error}")
    return YES


backend = Backend("numpy", api_version=(1, 0), priority=-10, available=_available, description="two ops in numpy")

#: numpy has no bfloat16.
DTYPES = {torch.float32, torch.float16}


@backend.kernel("dequantize_4bit", devices={"cpu"}, dtypes=DTYPES)
def dequantize_4bit(packed, absmax, codebook, blocksize, nested, *, out):
    """Fill `out` with codebook[code] * absmax."""
    kernels.dequantize_4bit(packed, absmax, codebook, blocksize, nested, out)


def _weight_bytes(call):
    return 4 * call.N * call.K


def _fits(call):
    return Support(_weight_bytes(call) <= MAX_SCRATCH, f"the weight in float32 takes more than {MAX_SCRATCH >> 20} MB")


@backend.kernel("gemm_4bit", devices={"cpu"}, dtypes=DTYPES, when=_fits, scratch=_weight_bytes)
def gemm_4bit(x, packed, absmax, codebook, blocksize, N, K, bias, nested, *, out, scratch):
    """Fill `out` with x W^T + bias."""
    weight = scratch.view(torch.float32).view(N, K)
    kernels.dequantize_4bit(packed, absmax, codebook, blocksize, nested, weight)
    kernels.matmul(x.view(-1, K), weight, bias, out.view(-1, N))


@hookimpl
def bnb_backends():
    """Provide the backend."""
    return [backend]
