"""Measure how much faster bnb-cpu-neon is on two cores than on one: `python benchmarks/neon_threads.py [--seconds 20]`.

A Linear4bit of 4096 by 4096 with 16 rows of float32. Runs with one and with two threads take turns, and the shortest of each
counts. On a machine that does other work, two cores are seldom free at once; so the processor time of the calling thread is
measured as well, which says how evenly the work is shared but nothing of the time that it takes to wake the other thread. On x86-64
NEON is emulated: times mean nothing there, their ratio does. Needs bnb-cpu-neon; prints the ratios and stores them in
benchmarks/results.
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
CLOCKS = {"wall": time.perf_counter, "processor time of the calling thread": time.thread_time}


def shortest_runs(layer: torch.nn.Module, x: torch.Tensor, seconds: float) -> Dict[str, Dict[int, float]]:
    """Return the shortest times of a call in seconds, by clock and number of threads."""
    shortest = {clock: {threads: float("inf") for threads in THREADS} for clock in CLOCKS}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for threads in THREADS:
            torch.set_num_threads(threads)
            start = [read() for read in CLOCKS.values()]
            layer(x)
            for (clock, read), before in zip(CLOCKS.items(), start):
                shortest[clock][threads] = min(shortest[clock][threads], read() - before)
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
            for clock, of_threads in times.items():
                speedup = of_threads[1] / of_threads[2]
                milliseconds = {threads: round(of_threads[threads] * 1e3, 3) for threads in THREADS}
                rows.append({"precision": precision, "clock": clock, "milliseconds": milliseconds, "speedup": round(speedup, 3)})
                print(f"{precision}, {clock}: {milliseconds[1]} ms with one, {milliseconds[2]} ms with two: {speedup:.2f} times")
    conditions = {
        "load_average": os.getloadavg()[0],
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
