"""Time the reference backend against bitsandbytes' pure-Python kernels, side by side in one run on the CPU.

    python benchmarks/reference_vs_bitsandbytes.py [--size 4096] [--threads 2] [--clock wall] [--repetitions 7] [--output NAME.json]

The peer is bitsandbytes' `default` backend, which any device without kernels of its own runs on. Where the CPU has C++ kernels,
those are passed over: each Python function is called by itself. Its two dequantizers are wrapped in torch.compile, and are timed so
(`compiled`) and as plain PyTorch (`eager`), because a machine without a C++ compiler runs the latter.

Calls alternate between the two sides, and the best time of each counts. Ratios below 1 mean that the reference backend is faster.
On a machine with other work, use `--threads 1 --clock cpu`: processor time leaves out waiting, and one thread waits for no other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

import bitsandbytes
import torch
from bitsandbytes import _ops as peer_ops
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

from bnb_core import ops
from bnb_core.backends import use_backend

BLOCKSIZE_4BIT = 64
BLOCKSIZE_8BIT = 256
THRESHOLD = 6.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Kernels = Dict[str, Callable[..., Any]]


class Case(NamedTuple):
    """One thing to time on both sides."""

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]


def load_peer(eager: bool) -> Kernels:
    """Load bitsandbytes' Python kernels by op name, with torch.compile as they ask for it or, if `eager`, without."""
    kernels: Kernels = {}

    def collect(name: str, _: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return lambda function: kernels.setdefault(name.split("::")[1], function)

    def leave(function: Optional[Callable[..., Any]] = None, **_: Any) -> Callable[..., Any]:
        return function if function is not None else lambda f: f

    spec = importlib.util.find_spec("bitsandbytes.backends.default.ops")
    assert spec is not None
    assert spec.loader is not None
    with mock.patch.object(peer_ops, "register_kernel", collect), mock.patch.object(
        torch, "compile", leave if eager else torch.compile
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return kernels


def block_cases(weight: torch.Tensor, compiled: Kernels, eager: Kernels) -> Iterator[Case]:
    """Yield quantization and dequantization of a weight."""
    nf4, dynamic = get_4bit_type("nf4", device="cpu"), create_dynamic_map()
    shape, dtype = weight.shape, weight.dtype
    packed, absmax = ops.quantize_4bit(weight, nf4, BLOCKSIZE_4BIT)
    codes, absmax8 = ops.quantize_blockwise(weight, dynamic, BLOCKSIZE_8BIT)
    yield Case(
        "quantize_4bit",
        lambda: ops.quantize_4bit(weight, nf4, BLOCKSIZE_4BIT),
        lambda: compiled["quantize_4bit"](weight, BLOCKSIZE_4BIT, "nf4", torch.uint8),
    )
    yield Case(
        "quantize_blockwise",
        lambda: ops.quantize_blockwise(weight, dynamic, BLOCKSIZE_8BIT),
        lambda: compiled["quantize_blockwise"](weight, dynamic, BLOCKSIZE_8BIT),
    )
    for label, peer in (("compiled", compiled), ("eager", eager)):
        yield Case(
            f"dequantize_4bit ({label} peer)",
            lambda: ops.dequantize_4bit(packed, absmax, nf4, BLOCKSIZE_4BIT, shape, dtype),
            partial(peer["dequantize_4bit"], packed, absmax, BLOCKSIZE_4BIT, "nf4", shape, dtype),
        )
        yield Case(
            f"dequantize_blockwise ({label} peer)",
            lambda: ops.dequantize_blockwise(codes, absmax8, dynamic, BLOCKSIZE_8BIT, dtype),
            partial(peer["dequantize_blockwise"], codes, absmax8, dynamic, BLOCKSIZE_8BIT, dtype),
        )


def product_cases(weight: torch.Tensor, rows: int, peer: Kernels) -> Iterator[Case]:
    """Yield products of a matrix with a few outlier columns and a weight, as bitsandbytes' Python functions compose them."""
    nf4 = get_4bit_type("nf4", device="cpu")
    N, K = weight.shape
    packed, absmax = ops.quantize_4bit(weight, nf4, BLOCKSIZE_4BIT)
    codes, row_absmax, _ = ops.int8_quantize_rows(weight)
    x = torch.randn(rows, K).to(weight.dtype)
    x[:, :4] += 2 * THRESHOLD

    def peer_gemm_4bit() -> torch.Tensor:
        dequantized = peer["dequantize_4bit"](packed, absmax, BLOCKSIZE_4BIT, "nf4", weight.shape, x.dtype)
        return torch.nn.functional.linear(x, dequantized)

    def peer_int8_linear(threshold: float) -> torch.Tensor:
        x_codes, x_absmax, outliers = peer["int8_vectorwise_quant"](x, threshold)
        product = peer["int8_linear_matmul"](x_codes, codes)
        y = peer["int8_mm_dequant"](product, x_absmax, row_absmax, x.dtype)
        if outliers is not None and outliers.numel():
            columns = codes[:, outliers] * (row_absmax.view(-1, 1) / 127)
            y = y.addmm(x[:, outliers], columns.to(x.dtype).t())
        return y

    yield Case(f"gemm_4bit M={rows}", lambda: ops.gemm_4bit(x, packed, absmax, nf4, BLOCKSIZE_4BIT, N, K), peer_gemm_4bit)
    for threshold in (0.0, THRESHOLD):
        yield Case(
            f"int8_linear threshold={threshold:g} M={rows}",
            partial(ops.int8_linear, x, codes, row_absmax, None, threshold),
            partial(peer_int8_linear, threshold),
        )


def all_cases(size: int) -> Iterator[Tuple[str, Case]]:
    """Yield everything that is timed, with the dtype's name."""
    compiled, eager = load_peer(eager=False), load_peer(eager=True)
    for name in ("float32", "float16", "bfloat16"):
        weight = torch.randn(size, size).to(getattr(torch, name))
        for case in block_cases(weight, compiled, eager):
            yield name, case
        for rows in (1, 16, 256):
            for case in product_cases(weight, rows, compiled):
                yield name, case


def best_times(case: Case, repetitions: int, clock: Callable[[], float]) -> Tuple[float, float]:
    """Return the best seconds of each side, which take turns; the first turn is not counted."""
    best = [float("inf"), float("inf")]
    for turn in range(repetitions + 1):
        for side, function in enumerate((case.ours, case.peer)):
            start = clock()
            function()
            seconds = clock() - start
            if turn:
                best[side] = min(best[side], seconds)
    return best[0], best[1]


def environment(arguments: argparse.Namespace) -> Dict[str, Any]:
    """Describe the machine, the versions and the settings of this run."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True).stdout
    cpu_info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        if cpu_info.exists()
        else []
    )
    return {
        "machine": platform.machine(),
        "cpu": models[0] if models else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "commit": commit + (" (changed)" if changed else ""),
        "clock": arguments.clock,
        "size": arguments.size,
        "repetitions": arguments.repetitions,
    }


def main() -> None:
    """Run the comparison, print it as a table, and store it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what to count: elapsed or processor time")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reference_vs_bitsandbytes.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    rows: List[Dict[str, Any]] = []
    print(f"{'case':<40}{'dtype':<10}{'reference ms':>14}{'bitsandbytes ms':>17}{'ratio':>8}")
    with use_backend("reference"):
        for name, case in all_cases(arguments.size):
            ours, peer = (seconds * 1e3 for seconds in best_times(case, arguments.repetitions, CLOCKS[arguments.clock]))
            print(f"{case.name:<40}{name:<10}{ours:>14.2f}{peer:>17.2f}{ours / peer:>8.2f}", flush=True)
            rows.append({"case": case.name, "dtype": name, "reference_ms": ours, "bitsandbytes_ms": peer, "ratio": ours / peer})
    result = {"environment": environment(arguments), "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
