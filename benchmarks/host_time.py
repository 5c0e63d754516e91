"""Time what the core adds to a kernel: eager calls on plain CPU tensors, with kernels that do nothing.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py [--output results/NAME.json]

Reported are microseconds of a whole call, and what is left of it after `torch.empty` has allocated the outputs. The best of many
short runs counts, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import timeit
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import torch

from bnb_core import ops
from bnb_core.backends import Backend, register, use_backend
from bnb_core.ops.spec import OPS

CALLS, RUNS = 1000, 300
N, K, TOKENS, BLOCKSIZE = 64, 64, 4, 64


def do_nothing(op: str) -> Callable[..., None]:
    """Make a kernel of the op's signature that leaves its outputs as they are."""
    parameters = ", ".join(OPS[op].kernel_parameters())
    kernel: Callable[..., None] = eval(f"lambda {parameters}, *, out: None")
    return kernel


def cases() -> Dict[str, Tuple[str, Tuple[Any, ...]]]:
    """Return the op and the arguments of each case, by name."""
    x, bias = torch.randn(TOKENS, K), torch.zeros(N)
    codebook = torch.linspace(-1, 1, 16)
    packed, absmax = torch.zeros(N * K // 2, dtype=torch.uint8), torch.ones(N * K // BLOCKSIZE)
    nested = ops.Nested(torch.ones(1), torch.linspace(-1, 1, 256), torch.tensor(0.0), 256)
    weight, nested_weight = (packed, absmax, codebook, BLOCKSIZE), (packed, absmax.byte(), codebook, BLOCKSIZE)
    codes, row_absmax = torch.zeros(N, K, dtype=torch.int8), torch.ones(N)
    return {
        "quantize_4bit": ("quantize_4bit", (x, codebook, BLOCKSIZE)),
        "dequantize_4bit": ("dequantize_4bit", (*weight, torch.Size((N, K)), torch.float32, None)),
        "gemm_4bit": ("gemm_4bit", (x, *weight, N, K, None, None)),
        "gemm_4bit, bias, nested": ("gemm_4bit", (x, *nested_weight, N, K, bias, nested)),
        "gemm_4bit, with a gradient to come": ("gemm_4bit", (x.clone().requires_grad_(), *weight, N, K, None, None)),
        "int8_linear": ("int8_linear", (x, codes, row_absmax, None, 6.0)),
    }


def best_of(function: Callable[[], Any]) -> float:
    """Return the microseconds that a call takes at best."""
    function()
    return min(timeit.repeat(function, number=CALLS, repeat=RUNS)) / CALLS * 1e6


def measure() -> Dict[str, Dict[str, float]]:
    """Time each case on a backend of its own."""
    backend = Backend("nothing", api_version=(1, 0), priority=-1)
    for op in sorted({op for op, _ in cases().values()}):
        backend.kernel(op, devices={"cpu"}, dtypes=[torch.float32])(do_nothing(op))
    register(backend)
    measured = {}
    with use_backend("nothing"):
        for name, (op, args) in cases().items():
            function = getattr(ops, op)
            results = function(*args)
            outputs = [(result.shape, result.dtype) for result in (results if isinstance(results, tuple) else (results,))]
            call = best_of(lambda: function(*args))  # noqa: B023
            allocation = best_of(lambda: [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in outputs])  # noqa: B023
            measured[name] = {"call": round(call, 2), "without torch.empty": round(call - allocation, 2)}
    return measured


def main() -> None:
    """Print the table and write the results where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write the results and the machine's description to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure()
    for name, times in results.items():
        print(f"{name:36}", "  ".join(f"{what} {time:6.2f} us" for what, time in times.items()))
    if arguments.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
        arguments.output.write_text(json.dumps({"machine": machine, "commit": commit, "microseconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
