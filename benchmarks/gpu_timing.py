"""Time work on a CUDA device: medians over replays of a CUDA graph, with inputs that take turns so that caches do not help."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch

#: Bytes that the inputs of one graph should take together: several times the L2 cache of the largest device.
ROTATION_BYTES = 256 << 20


def copies_for(bytes_each: int, most: int = 64) -> int:
    """Return how many sets of inputs of that size to take turns with."""
    return max(2, min(most, -(-ROTATION_BYTES // max(bytes_each, 1))))


def graph_microseconds(calls: Sequence[Callable[[], Any]], replays: int = 30) -> float:
    """Return the median time of a call, from replays of a graph that makes each of these calls once."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return event_microseconds(graph.replay, replays) / len(calls)


def event_microseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Return the median time of a call on the device."""
    times: List[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def host_microseconds(call: Callable[[], Any], calls: int = 100, repeats: int = 20) -> float:
    """Return the time that Python takes for a call, at best; the device is idle before each series."""
    for _ in range(10):
        call()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return best * 1e6


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Return the bytes a second of a copy within the device, those read and those written counted: the driver's or a kernel's."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    best = min(graph_microseconds([call]) for call in (lambda: target.copy_(source), lambda: torch.neg(source, out=target)))
    return 2 * size / (best * 1e-6)


def machine() -> Dict[str, Any]:
    """Describe the machine, the versions and the commit."""
    properties = torch.cuda.get_device_properties(0)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": head.stdout.strip(),
    }
