"""Products with 4-bit weights by way of dequantized panels and torch's own matrix product, and when that is faster.

Only for bfloat16: a dequantized float16 weight could overflow, where its scale is large, although the product does not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import current_stream, nested_addresses

#: The largest panel: a whole weight would double what an 8 GB board has to hold.
PANEL_BYTES = 32 << 20
#: Rows of x below which panels are never faster, so that nothing is worked out.
FEWEST_ROWS = 64

#: Floating-point operations that a multiprocessor does in a clock in torch's product, two thirds to four fifths of the best of the
#: tensor cores, by compute capability; the next lower one counts.
_LIBRARY_RATES = {80: 1400.0, 90: 3200.0}
#: How native/host/gemm_4bit.cpp cuts products for native/device/gemm_4bit_many.cu, and what it expects of each cut: clocks of a
#: stage of 128 columns by the rows of x in a tile, measured on sm_90; also rows and columns of its tiles, the fewest stages of a
#: block, clocks of a second launch, and bytes in a clock and multiprocessor of the sums that blocks share.
_STAGE_CLOCKS, _BLOCK_ROWS, _DEPTH, _FEWEST_STAGES = {32: 1740.0, 64: 2400.0, 128: 3860.0}, 128, 128, 2
_ADD_CLOCKS, _SUM_BYTES = 2000.0, 19.0
#: Clocks that native/device/gemm_4bit_few.cu takes for 16 rows of x: for a start, and for each element of W on a multiprocessor.
_FEW_ROWS, _FEW_START, _FEW_ELEMENT = 16, 1800.0, 0.08
#: Floating-point operations in a clock of the kernels for any shape, in float32.
_SCALAR_RATE = 60.0
#: Share of the memory's nominal speed that is reached, and microseconds that a launch takes after another.
_MEMORY_SHARE = 0.85
_LAUNCH = 2.0


class Costs:
    """Estimates of times on a device, in microseconds.

    Args:
        device: with `compute_capability`, `multiprocessors`, `clock_kilohertz`, `memory_clock_kilohertz` and `memory_bus_bits`.
    """

    def __init__(self, device: Any) -> None:
        self._clock = device.clock_kilohertz / 1e3  # in a microsecond
        self._multiprocessors = device.multiprocessors
        clocks = device.multiprocessors * self._clock
        self._bytes = 2 * device.memory_clock_kilohertz / 1e3 * device.memory_bus_bits / 8 * _MEMORY_SHARE
        known = [capability for capability in _LIBRARY_RATES if capability <= device.compute_capability]
        self._library = clocks * _LIBRARY_RATES[max(known, default=min(_LIBRARY_RATES))]
        self._scalar = clocks * _SCALAR_RATE

    def by_panels(self, M: int, N: int, K: int) -> float:
        """Estimate a product by way of panels.

        Of each element half a byte is read and two are written, of which nearly half are read again from beyond the caches. The
        first product begins late.
        """
        panels = -(-N * K * 2 // PANEL_BYTES)
        return (2 * panels + 1) * _LAUNCH + N * K * 3.4 / self._bytes + 2 * M * N * K / self._library

    def fused(self, M: int, N: int, K: int) -> float:
        """Estimate a product by the codes themselves: by the kernel for many rows of x, or several times by that for few."""
        stages = -(-K // _DEPTH)
        many = float("inf")
        for tokens, stage_clocks in _STAGE_CLOCKS.items():
            blocks = -(-N // _BLOCK_ROWS) * -(-M // tokens)
            each = -(-stages // max(1, min(self._multiprocessors // blocks, stages // _FEWEST_STAGES)))
            parts = -(-stages // each)
            clocks = -(-blocks * parts // self._multiprocessors) * each * stage_clocks
            if parts > 1:
                clocks += _ADD_CLOCKS + 8 * parts * M * N / (_SUM_BYTES * self._multiprocessors)
            many = min(many, clocks)
        few = -(-M // _FEW_ROWS) * (_FEW_START + N * K / self._multiprocessors * _FEW_ELEMENT)
        return _LAUNCH + min(many, few) / self._clock

    def scalar(self, M: int, N: int, K: int) -> float:
        """Estimate a product by the kernels for any shape."""
        return _LAUNCH + 2 * M * N * K / self._scalar


@lru_cache(maxsize=None)
def costs(ordinal: int) -> Costs:
    """Return the estimates for a CUDA device."""
    return Costs(_native.device(ordinal))


@lru_cache(maxsize=4096)
def panel_size(ordinal: int, M: int, N: int, K: int, blocksize: int, transposed: bool) -> int:
    """Return the rows of W in a panel, or where `transposed` the columns; 0 where panels are not faster, or not possible.

    Args:
        ordinal: the CUDA device's.
        M: rows of x.
        N, K: rows and columns of W.
        blocksize: elements that share a scale.
        transposed: for g W rather than x W^T.
    """
    if M < FEWEST_ROWS or K % 8 or _native.device(ordinal).compute_capability < 80:
        return 0
    estimates = costs(ordinal)
    fits_tensor_cores = not transposed and K % 64 == 0 and blocksize >= 64
    other = estimates.fused(M, N, K) if fits_tensor_cores else estimates.scalar(M, N, K)
    if estimates.by_panels(M, N, K) >= other:
        return 0
    lines, length = (K, N) if transposed else (N, K)
    size = PANEL_BYTES // (2 * length)
    return lines if size >= lines else size // 8 * 8


def multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor],
    nested: Optional[Nested],
    transposed: bool,
    size: int,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with x W^T + bias, or where `transposed` with x W.

    Args:
        size: of a panel, as `panel_size` returns it.
        scratch: 2 * size * K bytes, or 2 * size * N where `transposed`.
    """
    device = x.get_device()
    lines, length = (K, N) if transposed else (N, K)
    x, out = x.detach().view(-1, length), out.view(-1, lines)
    for first in range(0, lines, size):
        count = min(size, lines - first)
        part = (0, N, first, count) if transposed else (first, count, 0, K)
        _native.gemm_4bit_panel(
            device,
            current_stream(device),
            scratch.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            codebook.data_ptr(),
            blocksize,
            N,
            K,
            *part,
            *nested_addresses(nested),
        )
        values = scratch[: 2 * count * length].view(torch.bfloat16)
        panel = values.view(N, count) if transposed else values.view(count, K).t()
        product = out[:, first : first + count]
        if bias is None:
            torch.mm(x, panel, out=product)
        else:
            torch.addmm(bias[first : first + count], x, panel, out=product)
