"""Estimate what each way of multiplying by a 4-bit weight takes on a device, from what the driver says of it.

A path takes the time of its slower part, arithmetic or memory, and what its launches cost. Arithmetic is counted in clocks of a
multiprocessor, so that it holds for devices of another size; its constants are fits to `benchmarks/results/gpu_paths_h200.json`,
and hold for other devices as far as their multiprocessors do as much in a clock.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Tuple

from bnb_cuda_jetson import _native
from bnb_cuda_jetson.paths import MANY_TOKENS, PANELS, WMMA, panel_lines

#: Gigabytes a second of Jetson's modules, by compute capability and multiprocessors: their drivers report the clock of the GPU as
#: that of the memory. Where there are two, the slower; others get what a multiprocessor has on these.
_MODULES: Mapping[Tuple[int, int], float] = {
    (72, 6): 59.7,  # Xavier NX
    (72, 8): 136.5,  # AGX Xavier
    (87, 4): 34.0,  # Orin Nano 4 GB
    (87, 8): 68.0,  # Orin Nano 8 GB; Orin NX has 102
    (87, 14): 204.8,  # AGX Orin 32 GB
    (87, 16): 204.8,  # AGX Orin 64 GB
    (110, 20): 273.0,  # AGX Thor
}
_GIGABYTES_A_MULTIPROCESSOR = 12.8
#: Share of the nominal speed that a copy reaches: 4.23 of 4.92 TB/s on an H200, 114 of 137 GB/s on an AGX Xavier.
_COPY_SHARE = 0.85


class Figures(NamedTuple):
    """What the estimates need to know of a device."""

    compute_capability: int
    multiprocessors: int
    clock: float
    """Clocks in a microsecond."""
    bandwidth: float
    """Bytes in a microsecond that a copy reads and writes."""


def figures(device: Any) -> Figures:
    """Take what is needed from a device as `_native.device` returns it."""
    nominal = 2e-3 * device.memory_clock_kilohertz * device.memory_bus_bits / 8
    if device.integrated or not nominal:
        average = device.multiprocessors * _GIGABYTES_A_MULTIPROCESSOR
        nominal = 1e3 * _MODULES.get((device.compute_capability, device.multiprocessors), average)
    return Figures(device.compute_capability, device.multiprocessors, device.clock_kilohertz / 1e3, nominal * _COPY_SHARE)


#: Microseconds that a path takes whatever the size: launches, the table of pairs, the first codes from memory, the last sums.
_START = {"any": 2.0, "one": 3.2, "few": 2.6, "scalar": 2.6, "many": 2.8, WMMA: 2.6, PANELS: 1.7}
#: Clocks of a multiprocessor for an element of W: to look up its value, and to multiply it. For few rows of x by how many are taken
#: at a time, on tensor cores and without. A multiprocessor takes rows of W by tiles.
_ONE_CLOCKS, _ONE_TILE = 0.044, 8
_FEW_CLOCKS, _FEW_TILE = {1: 0.055, 4: 0.075, 8: 0.091, 16: 0.095, 32: 0.17}, 16
_NESTED_CLOCKS = {**_FEW_CLOCKS, 16: 0.145}  # with nested scales there are fewer warps for 16 rows
_SCALAR_CLOCKS = {1: 0.16, 2: 0.19}
#: Microseconds between one pass over W and the next, where there are more rows of x than are taken at a time.
_PASS = 1.5
#: Bytes of x that stay in the cache of a multiprocessor, and what it costs to read more again for every tile.
_CACHE, _UNCACHED = 200e3, 1.22
#: Clocks that a block of the kernels for many rows takes for 128 columns of 128 rows of W, by the rows of x in its tile: about 900
#: for the values, and 23 a row.
_STAGE_CLOCKS = {32: 1640.0, 64: 2380.0, 128: 3830.0}
#: Where blocks share the columns: microseconds of a second launch, and bytes in a clock and multiprocessor of the sums in between.
_ADD, _SUM_BYTES = 0.9, 14.0
#: Clocks that a block of the kernels for tensor cores before sm_80 takes for 64 columns of 128 rows of W, by the rows of x in its
#: tile, alone on a multiprocessor of sm_90.
_WMMA_CLOCKS = {16: 1830.0, 32: 2000.0, 64: 2470.0}
#: Of the kernel for any shape: its tiles of W and of x, and clocks that one takes for a column, alone on a multiprocessor and among
#: others.
_ANY_ROWS, _ANY_TOKENS, _ANY_ALONE, _ANY_CLOCKS = 64, 32, 206.0, 127.0
#: Floating-point operations in a clock and multiprocessor of torch's product, two thirds to four fifths of the best of the tensor
#: cores, by compute capability; the next lower one counts. That of sm_80 is not measured.
_LIBRARY_RATES = {80: 1400.0, 90: 3030.0}
#: Clocks for a column of torch's product where there is so little to do that each step waits for the one before.
_LIBRARY_STEP = 1.9
#: Bytes that go to and from memory for an element of a panel: half of one is read, two are written, and most of these read again.
_PANEL_BYTES_AN_ELEMENT = 3.9


def estimate(path: str, on: Figures, tensor_cores: bool, M: int, N: int, K: int, blocksize: int, nested: bool) -> float:
    """Return the microseconds that a product is likely to take.

    Args:
        path: one of those of `paths`, that can take the product.
        on: the device.
        tensor_cores: whether operands are float16 or bfloat16, on a device whose tensor cores are used.
        M: rows of x.
        N, K: rows and columns of W; the other way round for the product with a gradient.
        blocksize: elements that share a scale.
        nested: whether the scales are quantized.
    """
    read = N * K * (0.5 + 4 / blocksize) / on.bandwidth
    if path == "any":
        tiles = -(-N // _ANY_ROWS) * -(-M // _ANY_TOKENS)
        return _START["any"] + max(max(_ANY_ALONE, _each(tiles, on) * _ANY_CLOCKS) * K / on.clock, read)
    if path == "one":
        return _START["one"] + max(_each(-(-N // _ONE_TILE), on) * _ONE_TILE * K * _ONE_CLOCKS / on.clock, read)
    if path == "few":
        clocks = (_NESTED_CLOCKS if nested else _FEW_CLOCKS) if tensor_cores else _SCALAR_CLOCKS
        return _START["few" if tensor_cores else "scalar"] + _by_few(on, clocks, M, N, K, read)
    if path == WMMA:
        tokens = next((rows for rows in _WMMA_CLOCKS if rows >= M), max(_WMMA_CLOCKS))
        blocks = -(-N // 128) * -(-M // tokens)
        return _START[WMMA] + max(_each(blocks, on) * K / 64 * _WMMA_CLOCKS[tokens] / on.clock, read)
    if path == PANELS:
        return _by_panels(on, M, N, K)
    return _by_many(MANY_TOKENS[path], on, M, N, K, read)


def _each(tiles: int, on: Figures) -> int:
    """Return how many tiles the multiprocessor takes that has the most."""
    return -(-tiles // on.multiprocessors)


def _by_few(on: Figures, clocks_by_rows: Mapping[int, float], M: int, N: int, K: int, read: float) -> float:
    at_once = next((rows for rows in clocks_by_rows if rows >= M), max(clocks_by_rows))
    tiles, passes = _each(-(-N // _FEW_TILE), on), -(-M // at_once)
    clocks = tiles * _FEW_TILE * K * clocks_by_rows[at_once]
    if tiles > 1 and 2 * min(M, at_once) * K > _CACHE:
        clocks *= _UNCACHED
    return (passes - 1) * _PASS + passes * max(clocks / on.clock, read)


def _by_many(tokens: int, on: Figures, M: int, N: int, K: int, read: float) -> float:
    parts, stages = _native.gemm_4bit_cut(on.multiprocessors, tokens, M, N, K)
    blocks = -(-N // 128) * -(-M // tokens) * parts
    time = _START["many"] + max(_each(blocks, on) * stages * _STAGE_CLOCKS[tokens] / on.clock, read)
    if parts > 1:
        time += _ADD + 8 * parts * M * N / (_SUM_BYTES * on.multiprocessors * on.clock)
    return time


def _by_panels(on: Figures, M: int, N: int, K: int) -> float:
    panels = -(-N // panel_lines(N, K))
    known = [capability for capability in _LIBRARY_RATES if capability <= on.compute_capability]
    library = _LIBRARY_RATES[max(known, default=min(_LIBRARY_RATES))] * on.multiprocessors
    product = max(2 * M * N * K / library, panels * K * _LIBRARY_STEP) / on.clock
    return (2 * panels + 1) * _START[PANELS] + N * K * _PANEL_BYTES_AN_ELEMENT / on.bandwidth + product
