"""Measure how much faster bnb-cpu-neon is on two cores than on one: `python benchmarks/neon_threads.py [--seconds 20]`.

A Linear4bit of 4096 by 4096 with 16 rows of float32. Runs with one and with two threads take turns, and the shortest of each
counts, so that other work on the machine matters less. On x86-64 NEON is emulated: times mean nothing there, their ratio does.
Needs bnb-cpu-neon; prints the ratio and stores it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Dict

import torch
from bnb_cpu_neon import PRECISIONS, use_precision

import bnb_core as bnb

SIZE, ROWS, THREADS = 4096, 16, (1, 2)


def shortest_runs(layer: torch.nn.Module, x: torch.Tensor, seconds: float) -> Dict[int, float]:
    """Return the shortest time of a call in seconds, by the number of threads."""
    shortest = {threads: float("inf") for threads in THREADS}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for threads in THREADS:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            layer(x)
            shortest[threads] = min(shortest[threads], time.perf_counter() - start)
    return shortest


def main() -> None:
    """Measure in each precision, print, and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure each precision")
    seconds = parser.parse_args().seconds
    bnb.backends.set_backend("neon")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(ROWS, SIZE)
    rows = []
    with torch.no_grad():
        for precision in PRECISIONS:
            with use_precision(precision):
                layer(x)
                times = shortest_runs(layer, x, seconds)
            speedup = times[1] / times[2]
            milliseconds = {threads: round(times[threads] * 1e3, 3) for threads in THREADS}
            rows.append({"precision": precision, "milliseconds_by_threads": milliseconds, "speedup": round(speedup, 3)})
            print(f"{precision}: {milliseconds[1]} ms on one thread, {milliseconds[2]} ms on two, {speedup:.2f} times faster")
    conditions = {
        "layer": f"{SIZE}x{SIZE}",
        "rows": ROWS,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    path = Path(__file__).parent / "results" / "neon_threads.json"
    path.write_text(json.dumps({**conditions, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
