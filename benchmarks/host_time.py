"""Time what the core adds to a kernel: eager calls on plain CPU tensors, with kernels that do nothing.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py [--output results/NAME.json]

Reported are microseconds of a whole call, and what is left of it after `torch.empty` has allocated the outputs; for modules, what a
call takes over `torch.nn.functional.linear` on a weight of the same shape. The best of many short runs counts, taken in turns, so
that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import timeit
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch

from bnb_core import nn, ops
from bnb_core.backends import Backend, register, use_backend
from bnb_core.ops.spec import OPS

CALLS, RUNS = 500, 400
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


def modules() -> Dict[str, torch.nn.Module]:
    """Return linear layers by name, quantized."""
    layers = {
        "nn.Linear": torch.nn.Linear(K, N),
        "Linear4bit": nn.LinearNF4(K, N, compress_statistics=False),
        "Linear4bit, nested": nn.LinearNF4(K, N),
        "Linear8bitLt": nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0),
    }
    return {name: layer.to("cpu") for name, layer in layers.items()}


def best_of(*functions: Callable[[], Any]) -> List[float]:
    """Return the microseconds that a call of each function takes at best."""
    for function in functions:
        function()
    runs = [[timeit.timeit(function, number=CALLS) for function in functions] for _ in range(RUNS)]
    return [min(times) / CALLS * 1e6 for times in zip(*runs)]


def measure_ops() -> Dict[str, Dict[str, float]]:
    """Time each case."""
    measured = {}
    for name, (op, args) in cases().items():
        function = getattr(ops, op)
        results = function(*args)
        outputs = [(result.shape, result.dtype) for result in (results if isinstance(results, tuple) else (results,))]
        call, allocation = best_of(
            lambda: function(*args),  # noqa: B023
            lambda: [torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in outputs],  # noqa: B023
        )
        measured[name] = {"call": round(call, 2), "without torch.empty": round(call - allocation, 2)}
    return measured


def measure_modules(layers: Dict[str, torch.nn.Module]) -> Dict[str, Dict[str, float]]:
    """Time each module without gradients."""
    x, weight, bias = torch.randn(1, K), torch.randn(N, K), torch.zeros(N)
    with torch.no_grad():
        base, *times = best_of(
            lambda: torch.nn.functional.linear(x, weight, bias),
            *[partial(layer, x) for layer in layers.values()],
        )
    measured = {"F.linear": {"call": round(base, 2)}}
    for name, time in zip(layers, times):
        measured[name] = {"call": round(time, 2), "over F.linear": round(time - base, 2)}
    return measured


def measure() -> Dict[str, Dict[str, float]]:
    """Time ops and modules on a backend that does nothing."""
    layers = modules()
    backend = Backend("nothing", api_version=(1, 0), priority=-1)
    for op in sorted({op for op, _ in cases().values()}):
        backend.kernel(op, devices={"cpu"}, dtypes=[torch.float32])(do_nothing(op))
    register(backend)
    with use_backend("nothing"):
        return {**measure_ops(), **measure_modules(layers)}


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
