"""Choose the way in which a product with a 4-bit weight is worked out: what `bnb tune` found the fastest, or else an estimate."""

from __future__ import annotations

from functools import lru_cache
from typing import Dict, List, NamedTuple, Optional

import torch

from bnb_core.backends import tuning
from bnb_core.backends.discovery import registry
from bnb_cuda_jetson import _native, cost, paths
from bnb_cuda_jetson.calls import DTYPES

BACKEND = "jetson"
#: Rows of x that are measured. Others have the choice of the next larger number, or of the largest.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: Rows up to which nested scales are measured too: for more, paths rank as with plain ones.
MOST_NESTED = 32
_DTYPE_NAMES = {number: str(dtype).replace("torch.", "") for dtype, number in DTYPES.items()}


class Choice(NamedTuple):
    """How a product is worked out."""

    path: str
    """One of those that `paths.possible` lists."""
    lines: int
    """Rows of W in a panel, or columns for the product with a gradient; 0 where the path is another."""
    scratch: int
    """Bytes of temporary memory."""


@lru_cache(maxsize=4096)
def choose(ordinal: int, dtype: int, M: int, N: int, K: int, blocksize: int, nested_blocksize: int, alignment: int) -> Choice:
    """Choose how to work out x W^T; see `paths.possible` for the arguments."""
    possible = paths.possible(ordinal, dtype, M, N, K, blocksize, nested_blocksize, alignment)
    path = _measured(ordinal, dtype, M, N, K, nested_blocksize > 0, possible)
    if path is None:
        times = estimates(ordinal, dtype, M, N, K, blocksize, nested_blocksize > 0, possible)
        path = min(times, key=lambda path: times[path])
    return with_memory(ordinal, dtype, M, N, K, blocksize, nested_blocksize, path)


@lru_cache(maxsize=4096)
def choose_transposed(ordinal: int, dtype: int, M: int, N: int, K: int, blocksize: int, alignment: int) -> Choice:
    """Choose how to work out g W, for M rows of g; see `paths.possible` for the other arguments."""
    if M < paths.FEWEST_PANELS or not paths.takes_panels(ordinal, dtype, K, alignment):
        return Choice("any", 0, 0)
    times = estimates(ordinal, dtype, M, K, N, blocksize, False, ["any", paths.PANELS])
    return with_memory(ordinal, dtype, M, K, N, blocksize, 0, min(times, key=lambda path: times[path]))


def with_memory(ordinal: int, dtype: int, M: int, N: int, K: int, blocksize: int, nested_blocksize: int, path: str) -> Choice:
    """Return a path with the memory that it needs; see `paths.possible` for the arguments."""
    if path == paths.PANELS:
        lines = paths.panel_lines(N, K)
        return Choice(path, lines, 2 * lines * K)
    return Choice(path, 0, _native.gemm_4bit_scratch(ordinal, dtype, M, N, K, blocksize, nested_blocksize > 0, path))


def estimates(
    ordinal: int, dtype: int, M: int, N: int, K: int, blocksize: int, nested: bool, possible: List[str]
) -> Dict[str, float]:
    """Estimate the microseconds of each of these paths."""
    on = _figures(ordinal)
    tensor_cores = dtype != DTYPES[torch.float32] and on.compute_capability >= 80
    return {path: cost.estimate(path, on, tensor_cores, M, N, K, blocksize, nested) for path in possible}


@lru_cache(maxsize=None)
def _figures(ordinal: int) -> cost.Figures:
    return cost.figures(_native.device(ordinal))


def _measured(ordinal: int, dtype: int, M: int, N: int, K: int, nested: bool, possible: List[str]) -> Optional[str]:
    table = tuning.table(BACKEND, identity(ordinal))
    if table is None:
        return None
    rows = next((rows for rows in ROWS if rows >= M), ROWS[-1])
    times = table.cases.get(case_name(dtype, N, K, rows, nested and rows <= MOST_NESTED), {})
    known = [path for path in possible if path in times]
    return min(known, key=lambda path: times[path]) if known else None


def case_name(dtype: int, N: int, K: int, M: int, nested: bool) -> str:
    """Name products of this kind in a table."""
    return f"{_DTYPE_NAMES[dtype]} {N}x{K}{' nested' * nested}, {M} row{'s' * (M > 1)}"


def identity(ordinal: int) -> tuning.Identity:
    """Say what a table of this device is called, and what its times depend on."""
    from bnb_cuda_jetson import __version__

    device = _native.device(ordinal)
    version = _native.driver_version()
    return tuning.Identity(
        f"{device.name}, {device.multiprocessors} multiprocessors",
        {
            "driver": f"{version // 1000}.{version % 1000 // 10}",
            "clock": f"{device.clock_kilohertz // 1000} MHz",
            "torch": str(torch.__version__),
            "bnb-cuda-jetson": __version__,
        },
    )


def _forget() -> None:
    choose.cache_clear()


registry.on_change.append(_forget)
