"""The backend as a whole: complete, on any device, outside autograd, and small in memory."""

import subprocess
import sys

import bnb_reference
import pytest
import torch

from bnb_core.backends import ANY_DEVICE
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import OPS


@pytest.mark.parametrize("op", [name for name, spec in OPS.items() if spec.contract != "optimizer"])
def test_has_a_kernel_for_every_device_and_dtype(op):
    kernel = bnb_reference.backend.kernels[op]
    assert kernel.devices == {ANY_DEVICE}
    assert kernel.dtypes == set(OPS[op].dtypes)
    assert kernel.when is None


@pytest.mark.skipif(not REGISTERED, reason="this torch has no complete meta device")
def test_kernels_read_nothing_off_another_device(dtype, calls):
    # Tensors on the meta device have no values: a kernel that asked for one, or for a size that depends on one, would raise.
    for name, args, out in calls("meta", dtype):
        bnb_reference.backend.kernels[name].function(*args, out=out)


def test_calls_cover_all_kernels(calls):
    assert {name for name, _, _ in calls("cpu", torch.float32)} == {n for n, spec in OPS.items() if spec.contract != "optimizer"}


def test_inputs_that_require_grad(dtype, calls):
    for name, args, out in calls("cpu", dtype):
        trained = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        bnb_reference.backend.kernels[name].function(*trained, out=out)
        outputs = out if isinstance(out, tuple) else (out,)
        assert not any(tensor.requires_grad for tensor in outputs), name


MEASURE = """
import resource, sys, torch
import bnb_core.backends as backends, bnb_core.ops as ops, bnb_reference
backends.register(bnb_reference.backend)
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[2])

def run(n):
    x = torch.zeros(n, dtype=dtype).view(-1, 1024)
    table = torch.linspace(-1, 1, 16)
    if sys.argv[1] == "quantize_4bit":
        work = lambda: ops.quantize_4bit(x, table, 64)
    elif sys.argv[1] == "quantize_blockwise":
        table = torch.linspace(-1, 1, 256)
        work = lambda: ops.quantize_blockwise(x, table, 256)
    elif sys.argv[1] == "quantize_one_block":
        table = torch.linspace(-1, 1, 256)
        work = lambda: ops.quantize_blockwise(x, table, n)
    elif sys.argv[1] == "int8_quantize_rows_cols":
        work = lambda: ops.int8_quantize_rows_cols(x, 6.0)
    else:
        packed, absmax = torch.zeros(n // 2, dtype=torch.uint8), torch.ones(n // 64)
        work = lambda: ops.gemm_4bit(x[:4], packed, absmax, table, 64, n // 1024, 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (n * x.element_size())

run(1 << 17)  # loads what the first call loads
print(run(1 << 24))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize(
    "work", ["quantize_4bit", "quantize_blockwise", "quantize_one_block", "int8_quantize_rows_cols", "gemm_4bit"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_16_mi_elements_peak_under_four_times_the_input(work, dtype):
    # The input itself is the first of the four.
    command = [sys.executable, "-c", MEASURE, work, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 0 <= float(result.stdout) < 3
