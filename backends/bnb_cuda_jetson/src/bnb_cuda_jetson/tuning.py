"""What `bnb tune` measures: products with 4-bit weights, by each path that could be the fastest.

A time is the median over replays of a CUDA graph in which weights take turns, so that none is in a cache, as in a model with many.
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache, partial
from statistics import median
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from bnb_core.backends.tuning import Case, Tuning
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import _native, panels, paths
from bnb_cuda_jetson.calls import DTYPES, current_stream, nested_addresses
from bnb_cuda_jetson.choice import MOST_NESTED, ROWS, Choice, case_name, estimates, identity, with_memory

#: Rows and columns of weights: projections of language models from 0.5 B to 8 B parameters, and the head of one.
SHAPES = (
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (1024, 4096),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (896, 896),
    (4864, 896),
    (896, 4864),
    (128256, 2048),
)
#: Dtypes whose products may take different paths: float32 has few, and none that is close.
TUNED_DTYPES = (torch.bfloat16, torch.float16)
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
#: Paths that are estimated to take longer than this many times the fastest are not measured.
HOPELESS = 2.5
REPLAYS = 9
#: Weights that take turns exceed the cache so many times; and how many they are at most.
_CACHES, _MOST_WEIGHTS = 3, 48


class Weight(NamedTuple):
    """Arguments of a product: codes, which may be any, and scales, plain and nested."""

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_codes: torch.Tensor
    nested: Nested


def tuning(device: Optional[str], shapes: Sequence[Tuple[int, int]]) -> Tuning:
    """Implement the hook `bnb_tune`."""
    ordinal = _ordinal(device)
    for N, K in shapes:
        if K % 32:
            raise InvalidArgumentError(f"a weight of {N}x{K} has nothing to measure: its columns are not a multiple of 32")
    return Tuning(identity(ordinal), [case for N, K in shapes or SHAPES for case in _cases(ordinal, N, K)])


def _ordinal(device: Optional[str]) -> int:
    found = re.fullmatch(r"cuda(?::(\d+))?", device or "cuda")
    count = _native.device_count()
    ordinal = int(found.group(1) or 0) if found else count
    if ordinal >= count:
        devices = ", ".join(f"cuda:{i} ({_native.device(i).name})" for i in range(count)) or "none"
        raise InvalidArgumentError(f"there is no CUDA device {device!r} to tune for; there are: {devices}")
    if not _native.device(ordinal).architecture:
        raise InvalidArgumentError(f"this package has no code for cuda:{ordinal} ({_native.device(ordinal).name})")
    return ordinal


def _cases(ordinal: int, N: int, K: int) -> List[Case]:
    cases = []
    for M, dtype, nested in itertools.product(ROWS, TUNED_DTYPES, (False, True)):
        if nested and M > MOST_NESTED:
            continue
        likely = likely_paths(ordinal, dtype, M, N, K, nested, HOPELESS)
        if len(likely) > 1:
            measure = partial(_measure, ordinal, dtype, M, N, K, nested, tuple(likely))
            cases.append(Case(case_name(DTYPES[dtype], N, K, M, nested), measure))
    return cases


def likely_paths(ordinal: int, dtype: torch.dtype, M: int, N: int, K: int, nested: bool, hopeless: float) -> List[str]:
    """List the paths that are estimated to take at most `hopeless` times as long as the fastest."""
    number = DTYPES[dtype]
    possible = paths.possible(ordinal, number, M, N, K, BLOCKSIZE, NESTED_BLOCKSIZE * nested, 0)
    times = estimates(ordinal, number, M, N, K, BLOCKSIZE, nested, possible)
    return [path for path in times if times[path] <= hopeless * min(times.values())]


def _measure(ordinal: int, dtype: torch.dtype, M: int, N: int, K: int, nested: bool, likely: Sequence[str]) -> Mapping[str, float]:
    with torch.cuda.device(ordinal), torch.no_grad():
        return time_paths(ordinal, dtype, M, N, K, nested, likely, make_weights(ordinal, N, K), REPLAYS)


@lru_cache(maxsize=1)  # cases of a shape follow one another
def make_weights(ordinal: int, N: int, K: int) -> List[Weight]:
    """Make weights of N rows and K columns, so many that together they exceed the device's caches."""
    size = N * K // 2 + 4 * N * K // BLOCKSIZE
    count = max(2, min(_MOST_WEIGHTS, -(-_CACHES * _native.device(ordinal).l2_bytes // size)))
    device = torch.device("cuda", ordinal)
    blocks = -(-N * K // BLOCKSIZE)
    codebook, offset = torch.linspace(-1, 1, 256, device=device), torch.zeros((), device=device)
    return [
        Weight(
            torch.randint(0, 256, (-(-N * K // 2),), dtype=torch.uint8, device=device),
            torch.rand(blocks, device=device).mul_(0.05),
            torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
            Nested(torch.rand(-(-blocks // NESTED_BLOCKSIZE), device=device), codebook, offset, NESTED_BLOCKSIZE),
        )
        for _ in range(count)
    ]


def time_paths(
    ordinal: int,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    nested: bool,
    likely: Sequence[str],
    weights: Sequence[Weight],
    replays: int,
) -> Dict[str, float]:
    """Return the microseconds of a product by each of these paths, by name. The device is torch's current one.

    Args:
        ordinal: the device's.
        dtype: of x.
        M: rows of x.
        N, K: rows and columns of W.
        nested: whether scales are.
        likely: the paths.
        weights: to take turns.
        replays: of a graph that multiplies by each weight once.
    """
    device = torch.device("cuda", ordinal)
    x = torch.randn(M, K, device=device).to(dtype)
    out = torch.empty(M, N, device=device, dtype=dtype)
    codebook = torch.linspace(-1, 1, 16, device=device)
    times = {}
    for path in likely:
        choice = with_memory(ordinal, DTYPES[dtype], M, N, K, BLOCKSIZE, NESTED_BLOCKSIZE * nested, path)
        scratch = torch.empty(choice.scratch, dtype=torch.uint8, device=device)
        run = partial(_multiply, choice, x, nested=nested, codebook=codebook, out=out, scratch=scratch)
        times[path] = _graph_microseconds(run, weights, replays)
    return times


def _multiply(
    choice: Choice, x: torch.Tensor, weight: Weight, nested: bool, codebook: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor
) -> None:
    (M, K), N, device, packed = x.shape, out.shape[1], x.get_device(), weight.packed
    absmax, statistics = (weight.absmax_codes, weight.nested) if nested else (weight.absmax, None)
    if choice.lines:
        panels.multiply(x, packed, absmax, codebook, BLOCKSIZE, N, K, None, statistics, False, choice.lines, out, scratch)
        return
    addresses = x.data_ptr(), M, packed.data_ptr(), absmax.data_ptr(), codebook.data_ptr()
    _native.gemm_4bit(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[x.dtype],
        *addresses,
        BLOCKSIZE,
        N,
        K,
        0,
        *nested_addresses(statistics),
        scratch.data_ptr(),
        choice.path,
    )


def _graph_microseconds(run: Callable[[Weight], None], weights: Sequence[Weight], replays: int) -> float:
    # On the side stream that torch captures on, so that what a library allocates at first use is there before.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(weights[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for weight in weights:
            run(weight)
    times = []
    graph.replay()
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(weights))
    return median(times)
