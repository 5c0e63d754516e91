"""Time quantization and optimizer steps on a CUDA device, against bitsandbytes and against the speed of a copy.

python benchmarks/gpu_memory_bound.py [--output results/NAME.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import gpu_timing
import torch

import bnb_core
from bnb_core import ops
from bnb_core.quantization.codebooks import get_codebook

ELEMENTS = 56 << 20
PARAMETERS = 64 << 20


def quantization() -> List[Dict[str, Any]]:
    """Time quantize and dequantize, 4-bit and 8-bit, bfloat16."""

    importlib.import_module("bitsandbytes")  # registers its operators
    peer = torch.ops.bitsandbytes
    x = torch.randn(ELEMENTS, device="cuda", dtype=torch.bfloat16)
    nf4, fp4 = get_codebook("nf4", "cuda"), get_codebook("fp4", "cuda")
    dynamic = bnb_core.functional.create_dynamic_map().cuda()
    packed, absmax = ops.quantize_4bit(x, nf4, 64)
    offset = absmax.mean()
    nested_codes, nested_absmax = ops.quantize_blockwise(absmax - offset, dynamic, 256)
    nested = ops.Nested(nested_absmax, dynamic, offset, 256)
    shape, dtype = (ELEMENTS,), torch.bfloat16
    rows = []

    def row(work: str, moved: float, ours: Callable[[], Any], theirs: Optional[Callable[[], Any]]) -> None:
        rows.append(
            {
                "work": work,
                "bytes": moved,
                "microseconds": gpu_timing.graph_microseconds([ours] * 4),
                # Its launches of quantize kernels are not on torch's current stream, so that no graph captures them.
                "bitsandbytes": gpu_timing.event_microseconds(theirs, 5, calls=20) if theirs else None,
            }
        )

    def dequantize_nested() -> None:
        scales = peer.dequantize_blockwise(nested_codes, nested_absmax, dynamic, 256, torch.float32)
        peer.dequantize_4bit(packed, scales + offset, 64, "nf4", shape, dtype)

    n = float(ELEMENTS)
    row(
        "quantize_4bit nf4",
        n * (2 + 0.5 + 4 / 64),
        lambda: ops.quantize_4bit(x, nf4, 64),
        lambda: peer.quantize_4bit(x, 64, "nf4", torch.uint8),
    )
    row(
        "dequantize_4bit nf4",
        n * (2 + 0.5 + 4 / 64),
        lambda: ops.dequantize_4bit(packed, absmax, nf4, 64, shape, dtype),
        lambda: peer.dequantize_4bit(packed, absmax, 64, "nf4", shape, dtype),
    )
    row(
        "dequantize_4bit nf4 nested",
        n * (2 + 0.5 + 1 / 64),
        lambda: ops.dequantize_4bit(packed, nested_codes, nf4, 64, shape, dtype, nested),
        dequantize_nested,
    )
    for blocksize in (256, 4096):
        codes, scales = ops.quantize_blockwise(x, dynamic, blocksize)
        row(
            f"quantize_blockwise {blocksize}",
            n * (2 + 1 + 4 / blocksize),
            lambda blocksize=blocksize: ops.quantize_blockwise(x, dynamic, blocksize),
            lambda blocksize=blocksize: peer.quantize_blockwise(x, dynamic, blocksize),
        )
        row(
            f"dequantize_blockwise {blocksize}",
            n * (2 + 1 + 4 / blocksize),
            lambda codes=codes, scales=scales, blocksize=blocksize: ops.dequantize_blockwise(
                codes, scales, dynamic, blocksize, dtype
            ),
            lambda codes=codes, scales=scales, blocksize=blocksize: peer.dequantize_blockwise(
                codes, scales, dynamic, blocksize, dtype
            ),
        )
    row("quantize_4bit fp4", n * (2 + 0.5 + 4 / 64), lambda: ops.quantize_4bit(x, fp4, 64), None)
    return rows


#: Optimizers by bitsandbytes' names: bytes of state that a step reads and writes for each element.
OPTIMIZERS = {
    "AdamW8bit": 4 * (1 + 4 / 256),
    "Lion8bit": 2 * (1 + 4 / 256),
    "SGD8bit": 2 * (1 + 4 / 256),
    "AdEMAMix8bit": 6 * (1 + 4 / 256),
    "AdamW": 16.0,
    "Lion": 8.0,
}


def optimizers() -> List[Dict[str, Any]]:
    """Time a step of one large parameter."""
    import bitsandbytes

    rows = []
    for name, state_bytes in OPTIMIZERS.items():
        for dtype in (torch.float32, torch.bfloat16):
            times = []
            for library in (bnb_core.optim, bitsandbytes.optim):
                param = torch.nn.Parameter(torch.randn(PARAMETERS, device="cuda", dtype=dtype))
                param.grad = torch.randn_like(param)
                options: Dict[str, Any] = {"lr": 1e-3}
                if name == "SGD8bit":
                    options["momentum"] = 0.9
                optimizer = getattr(library, name)([param], **options)
                for _ in range(3):
                    optimizer.step()
                times.append(gpu_timing.event_microseconds(optimizer.step, 5, calls=20))
                del optimizer, param
            element_bytes = 3 * dtype.itemsize + state_bytes
            rows.append(
                {
                    "work": f"{name} {str(dtype)[6:]}",
                    "bytes": PARAMETERS * element_bytes,
                    "microseconds": times[0],
                    "bitsandbytes": times[1],
                }
            )
    return rows


def main() -> None:
    """Measure, print a table and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    bandwidth = gpu_timing.copy_bandwidth()
    rows = quantization() + optimizers()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    for row in rows:
        share = row["share_of_copy_bandwidth"] = row["bytes"] / (row["microseconds"] * 1e-6) / bandwidth
        ratio = row["bitsandbytes"] / row["microseconds"] if row["bitsandbytes"] else None
        print(
            f"{row['work']:42} {row['microseconds']:9.1f} us {share:7.1%} of copy"
            + (f"   bitsandbytes {row['bitsandbytes']:9.1f} us, {ratio:.2f} times as long" if ratio else "")
        )
    if arguments.output:
        arguments.output.write_text(
            json.dumps({**gpu_timing.machine(), "copy_bytes_per_second": bandwidth, "results": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
