"""Time products with quantized weights on a CUDA device, against bitsandbytes, bfloat16 `F.linear` and the speed of a copy.

    python benchmarks/gpu_vs_bitsandbytes.py [--rows 1 8 64] [--output results/NAME.json]

Every figure is the median over replays of a CUDA graph whose weights take turns, so that none is in a cache. What cannot be
captured is timed by events, and says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import bitsandbytes
import gpu_timing
import torch
from gpu_products import ROWS, SHAPES

from bnb_core import ops
from bnb_core.quantization.codebooks import get_codebook

INT8_SHAPES = ((4096, 4096), (14336, 4096))
INT8_ROWS = (1, 4, 16, 64, 512)
BLOCKSIZE = 64
REPLAYS = 9


class Weight4bit:
    """A bfloat16 weight's NF4 codes, with plain and with nested scales."""

    def __init__(self, N: int, K: int, codebook: torch.Tensor) -> None:
        weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02
        self.packed, self.absmax = ops.quantize_4bit(weight, codebook, BLOCKSIZE)
        dynamic = get_codebook("dynamic", "cuda")
        offset = self.absmax.mean()
        self.codes, nested_absmax = ops.quantize_blockwise(self.absmax - offset, dynamic, 256)
        self.nested = ops.Nested(nested_absmax, dynamic, offset, 256)


def four_bit(shapes: Sequence[Tuple[int, int]], rows: Sequence[int], copy_bandwidth: float) -> List[Dict[str, Any]]:
    """Time `gemm_4bit` of bfloat16 rows, plain and nested."""
    nf4 = get_codebook("nf4", "cuda")
    results = []
    for N, K in shapes:
        weight_bytes = N * K // 2 + N * K // BLOCKSIZE * 4
        weights = [Weight4bit(N, K, nf4) for _ in range(gpu_timing.copies_for(weight_bytes))]
        dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(gpu_timing.copies_for(N * K * 2))]
        for M in rows:
            timed = _four_bit_times(torch.randn(M, K, device="cuda", dtype=torch.bfloat16), N, K, nf4, weights, dense)
            moved = weight_bytes + 2 * M * (N + K)
            share = moved / (timed["microseconds"] * 1e-6) / copy_bandwidth
            results.append({"N": N, "K": K, "M": M, "bytes": moved, "share_of_copy_bandwidth": share, **timed})
            print(
                f"4-bit {N:6}x{K:<5} M={M:<4} {timed['microseconds']:8.2f} us  nested {timed['nested']:8.2f}"
                f"  bitsandbytes {timed['bitsandbytes']:8.2f} ({timed['bitsandbytes'] / timed['microseconds']:5.2f}x)"
                f"  bf16 {timed['bfloat16']:8.2f} ({timed['bfloat16'] / timed['microseconds']:5.2f}x)  {share:4.0%} of copy",
                flush=True,
            )
    return results


def _four_bit_times(
    x: torch.Tensor, N: int, K: int, nf4: torch.Tensor, weights: Sequence[Weight4bit], dense: Sequence[torch.Tensor]
) -> Dict[str, float]:
    peer = torch.ops.bitsandbytes.gemm_4bit
    return {
        "microseconds": _timed(lambda w: ops.gemm_4bit(x, w.packed, w.absmax, nf4, BLOCKSIZE, N, K), weights),
        "nested": _timed(lambda w: ops.gemm_4bit(x, w.packed, w.codes, nf4, BLOCKSIZE, N, K, None, w.nested), weights),
        "bitsandbytes": _timed(lambda w: peer(x, w.packed.view(-1, 1), (N, K), w.absmax, BLOCKSIZE, "nf4"), weights),
        "bfloat16": _timed(lambda w: torch.nn.functional.linear(x, w), dense),
    }


def int8(copy_bandwidth: float) -> List[Dict[str, Any]]:
    """Time LLM.int8() of float16 rows, without and with outlier columns."""
    results = []
    for N, K in INT8_SHAPES:
        codes = [torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8) for _ in range(gpu_timing.copies_for(N * K))]
        absmax = torch.rand(N, device="cuda") + 0.1
        for M in INT8_ROWS:
            x = torch.randn(M, K, device="cuda", dtype=torch.float16)
            x[:, ::512] = 20.0
            timed: Dict[str, float] = {}
            for threshold in (0.0, 6.0):
                timed[f"threshold {threshold:g}"] = _int8_time(x, codes, absmax, threshold)
            for threshold in (0.0, 6.0):
                timed[f"bitsandbytes {threshold:g}, by events"] = _int8_peer_time(x, codes[0], absmax, threshold)
            share = N * K / (timed["threshold 0"] * 1e-6) / copy_bandwidth
            results.append({"N": N, "K": K, "M": M, "share_of_copy_bandwidth": share, **timed})
            figures = "  ".join(f"{name} {microseconds:.2f} us" for name, microseconds in timed.items())
            print(f"int8 {N:6}x{K:<5} M={M:<4} {figures}  {share:4.0%} of copy", flush=True)
    return results


def _int8_time(x: torch.Tensor, codes: Sequence[torch.Tensor], absmax: torch.Tensor, threshold: float) -> float:
    return _timed(lambda w: ops.int8_linear(x, w, absmax, None, threshold), codes)


def _int8_peer_time(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, threshold: float) -> float:
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.threshold = codes, absmax, False, threshold
    with torch.no_grad():  # with a threshold it synchronizes, and cannot be captured
        return gpu_timing.event_microseconds(lambda: bitsandbytes.matmul(x, codes, state=state), 20)


def _timed(call: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    with torch.no_grad():
        return gpu_timing.graph_microseconds([lambda given=given: call(given) for given in inputs], REPLAYS)


def main() -> None:
    """Run all, print as it goes, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="rows of x")
    parser.add_argument("--shapes", type=int, nargs="*", help="N K N K ... instead of all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gpu_timing.event_microseconds(lambda: torch.mm(large, large), 300)  # clocks rise with work
    shapes = list(zip(arguments.shapes[::2], arguments.shapes[1::2])) if arguments.shapes else SHAPES
    copy_bandwidth = gpu_timing.copy_bandwidth()
    results = {
        "machine": gpu_timing.machine(),
        "copy_bandwidth": copy_bandwidth,
        "bitsandbytes": bitsandbytes.__version__,
        "gemm_4bit": four_bit(shapes, arguments.rows, copy_bandwidth),
        "int8_linear": int8(copy_bandwidth),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
