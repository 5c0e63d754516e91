"""Count the bytes that a multiprocessor takes in a clock where memory does not hold it up: inputs lie in the L2 cache.

    python benchmarks/gpu_resident.py [--output results/NAME.json]

A kernel is timed at two sizes that both fit into the cache, by replays of a CUDA graph over the same tensors. The difference of
the times, for the difference of the bytes, leaves out what a launch takes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import bnb_cuda_jetson
import gpu_timing
import torch
from gpu_memory_bound import OPTIMIZERS

import bnb_core
from bnb_core import ops
from bnb_core.quantization.codebooks import get_codebook

#: Bytes that all tensors of a call take together: the larger fits into half of the cache of the devices that this is run on.
SMALLER, LARGER = 6 << 20, 18 << 20
#: Calls in a graph.
CALLS = 20


class Work(NamedTuple):
    """A kernel, as a function that makes a call of so many elements, and the bytes that it moves for each."""

    name: str
    element_bytes: float
    make: Callable[[int], Callable[[], Any]]


def quantization() -> List[Work]:
    """List quantization, of bfloat16."""
    dtype = torch.bfloat16
    nf4, dynamic = get_codebook("nf4", "cuda"), get_codebook("dynamic", "cuda")

    def values(n: int) -> torch.Tensor:
        return torch.randn(n, device="cuda", dtype=dtype)

    def quantize_4bit(n: int) -> Callable[[], Any]:
        x = values(n)
        out = ops.quantize_4bit(x, nf4, 64)
        return lambda: ops.quantize_4bit(x, nf4, 64, out=out)

    def dequantize_4bit(n: int) -> Callable[[], Any]:
        packed, absmax = ops.quantize_4bit(values(n), nf4, 64)
        out = values(n)
        return lambda: ops.dequantize_4bit(packed, absmax, nf4, 64, (n,), dtype, out=out)

    def quantize_blockwise(n: int) -> Callable[[], Any]:
        x = values(n)
        out = ops.quantize_blockwise(x, dynamic, 256)
        return lambda: ops.quantize_blockwise(x, dynamic, 256, out=out)

    def dequantize_blockwise(n: int) -> Callable[[], Any]:
        codes, absmax = ops.quantize_blockwise(values(n), dynamic, 256)
        out = values(n)
        return lambda: ops.dequantize_blockwise(codes, absmax, dynamic, 256, dtype, out=out)

    return [
        Work("quantize_4bit nf4", 2 + 0.5 + 4 / 64, quantize_4bit),
        Work("dequantize_4bit nf4", 2 + 0.5 + 4 / 64, dequantize_4bit),
        Work("quantize_blockwise 256", 2 + 1 + 4 / 256, quantize_blockwise),
        Work("dequantize_blockwise 256", 2 + 1 + 4 / 256, dequantize_blockwise),
    ]


def products() -> List[Work]:
    """List products of one row with an NF4 and an int8 weight of 4096 columns."""
    K, nf4 = 4096, get_codebook("nf4", "cuda")

    def gemm_4bit(n: int) -> Callable[[], Any]:
        N = n // K
        packed = torch.randint(0, 256, (n // 2,), device="cuda", dtype=torch.uint8)
        absmax = torch.rand(n // 64, device="cuda")
        x = torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
        out = x.new_empty(1, N)
        return lambda: ops.gemm_4bit(x, packed, absmax, nf4, 64, N, K, out=out)

    def int8_linear(n: int) -> Callable[[], Any]:
        codes = torch.randint(-127, 128, (n // K, K), device="cuda", dtype=torch.int8)
        absmax = torch.rand(n // K, device="cuda")
        x = torch.randn(1, K, device="cuda", dtype=torch.float16)
        return lambda: ops.int8_linear(x, codes, absmax, None, 0.0)

    return [Work("gemm_4bit nf4, one row", 0.5 + 4 / 64, gemm_4bit), Work("int8_linear, one row", 1.0, int8_linear)]


def optimizers() -> List[Work]:
    """List steps of one parameter."""

    def step(name: str, dtype: torch.dtype) -> Callable[[int], Callable[[], Any]]:
        def make(n: int) -> Callable[[], Any]:
            param = torch.nn.Parameter(torch.randn(n, device="cuda", dtype=dtype))
            param.grad = torch.randn_like(param)
            options = {"momentum": 0.9} if name == "SGD8bit" else {}
            optimizer = getattr(bnb_core.optim, name)([param], lr=1e-3, capturable=True, **options)
            optimizer.step()
            return optimizer.step

        return make

    return [
        Work(f"{name} {str(dtype)[6:]}", 3 * dtype.itemsize + state_bytes, step(name, dtype))
        for name, state_bytes in OPTIMIZERS.items()
        for dtype in (torch.float32, torch.bfloat16)
    ]


def measure(work: Work, clocks_per_microsecond: float) -> Dict[str, Any]:
    """Time a kernel at both sizes."""
    times, moved = [], []
    for size in (SMALLER, LARGER):
        n = int(size / work.element_bytes) // 4096 * 4096
        moved.append(n * work.element_bytes)
        times.append(min(gpu_timing.graph_microseconds([work.make(n)] * CALLS) for _ in range(2)))
    return {
        "work": work.name,
        "bytes": moved,
        "microseconds": times,
        "bytes_per_clock_and_multiprocessor": taken(moved, times) / clocks_per_microsecond,
    }


def taken(moved: Sequence[float], times: Sequence[float]) -> float:
    """Return bytes a microsecond, without what a launch takes.

    Where the larger call takes hardly longer, launches are most of both. Then all of it counts: the kernel takes more than that.
    """
    longer = times[1] - times[0]
    return (moved[1] - moved[0]) / longer if longer > times[0] / 10 else moved[1] / times[1]


def main() -> None:
    """Measure, print a table and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gpu_timing.event_microseconds(lambda: torch.mm(large, large), 100)  # clocks rise with work
    device = bnb_cuda_jetson._native.device(0)
    clocks = device.multiprocessors * device.clock_kilohertz / 1e3
    rows = []
    with torch.no_grad():
        for work in quantization() + products() + optimizers():
            rows.append(measure(work, clocks))
            print(f"{work.name:28} {rows[-1]['bytes_per_clock_and_multiprocessor']:6.1f} bytes a clock and multiprocessor")
    if arguments.output:
        machine = {**gpu_timing.machine(), "clock_kilohertz": device.clock_kilohertz, "l2_bytes": device.l2_bytes}
        arguments.output.write_text(json.dumps({"machine": machine, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
