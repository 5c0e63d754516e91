"""Time every path of products with 4-bit weights on a CUDA device, and see how near the automatic choice comes to the fastest.

    python benchmarks/gpu_paths.py [--dtypes bfloat16 float16] [--output results/NAME.json]

The choice is looked at twice: by the estimates alone, and by the table of `bnb tune`, which is made here for the same shapes. Every
time is the median over replays of a CUDA graph whose weights take turns, so that none is in a cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import gpu_timing
import torch
from bnb_cuda_jetson import _native, cost
from bnb_cuda_jetson import tuning as products
from bnb_cuda_jetson.calls import DTYPES
from bnb_cuda_jetson.choice import choose, estimates
from gpu_products import ROWS, SHAPES

from bnb_core.backends import refresh, tuning

#: Paths that are estimated to take longer than this many times the fastest are left out.
HOPELESS = 6.0
REPLAYS = 15


def choice(dtype: torch.dtype, M: int, N: int, K: int, nested: bool) -> str:
    """Name the path that a call takes."""
    return choose(0, DTYPES[dtype], M, N, K, products.BLOCKSIZE, products.NESTED_BLOCKSIZE * nested, 0).path


def measure(dtype: torch.dtype, shapes: Tuple[Tuple[int, int], ...]) -> List[Dict[str, Any]]:
    """Time all paths of all shapes, with plain and with nested scales, and note what the estimates say."""
    rows = []
    for N, K in shapes:
        weights = products.make_weights(0, N, K)
        for M, nested in itertools.product(ROWS, (False, True)):
            likely = products.likely_paths(0, dtype, M, N, K, nested, HOPELESS)
            times = products.time_paths(0, dtype, M, N, K, nested, likely, weights, REPLAYS)
            estimated = estimates(0, DTYPES[dtype], M, N, K, products.BLOCKSIZE, nested, likely)
            case = {"dtype": str(dtype), "N": N, "K": K, "M": M, "nested": nested}
            rows.append({**case, "microseconds": times, "estimated": estimated})
    return rows


def judge(rows: List[Dict[str, Any]], name: str) -> float:
    """Add what is chosen now, and its time by the fastest; return the largest ratio."""
    for row in rows:
        times = row["microseconds"]
        dtype = getattr(torch, row["dtype"].replace("torch.", ""))
        chosen = choice(dtype, row["M"], row["N"], row["K"], row["nested"])
        row[name] = {"path": chosen, "to_the_fastest": times[chosen] / min(times.values())}
    return max(row[name]["to_the_fastest"] for row in rows)


def tuned(shapes: Tuple[Tuple[int, int], ...]) -> float:
    """Make a table as `bnb tune` does, and return the seconds that takes."""
    start = time.monotonic()
    tuning.write(tuning.measure("jetson", products.tuning("cuda:0", shapes), 30.0))
    seconds = time.monotonic() - start
    refresh()
    return seconds


def show(row: Dict[str, Any]) -> str:
    """Say what was measured of a shape in a line."""
    times = "  ".join(f"{path} {took:8.2f} ({row['estimated'][path]:8.2f})" for path, took in row["microseconds"].items())
    marks = "  ".join(f"{row[name]['path']} {row[name]['to_the_fastest']:.2f}" for name in ("by estimate", "by table"))
    scales = "nested" if row["nested"] else ""
    return f"{row['dtype'][6:]:8} {row['N']:6}x{row['K']:<5} {scales:6} M={row['M']:<4} {marks:32} {times}"


def main() -> None:
    """Measure, print a table and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16"])
    parser.add_argument("--shapes", type=int, nargs="*", help="N K N K ... instead of all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shapes = tuple(zip(arguments.shapes[::2], arguments.shapes[1::2])) if arguments.shapes else SHAPES
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gpu_timing.event_microseconds(lambda: torch.mm(large, large), 300)  # clocks rise with work
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["BNB_TUNE_CACHE"] = folder
        rows = [row for dtype in arguments.dtypes for row in measure(getattr(torch, dtype), shapes)]
        worst = {"by estimate": judge(rows, "by estimate")}
        seconds = tuned(shapes)
        worst["by table"] = judge(rows, "by table")
    for row in rows:
        print(show(row))
    print(f"slowest choice to the fastest path: {worst}; the table took {seconds:.1f} s", flush=True)
    figures = cost.figures(_native.device(0))._asdict()
    results = {"machine": gpu_timing.machine(), "figures": figures, "worst": worst, "tune_seconds": seconds, "products": rows}
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
