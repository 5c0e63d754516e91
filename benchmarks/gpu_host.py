"""Time what Python and the driver take for calls whose work on a CUDA device is small, with our functions and with bitsandbytes'.

python benchmarks/gpu_host.py [--output results/NAME.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import gpu_timing
import torch

from bnb_core import ops
from bnb_core.quantization.codebooks import get_codebook

#: Parameters of the optimizer, each of 8192 elements.
TENSORS = 200
#: How often everything is timed, the least counting: another program on the machine slows down calls for seconds.
ROUNDS = 3


def calls(library: Any) -> Dict[str, Callable[[], Any]]:
    """Return the calls that both libraries have, by name."""
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    layer = library.nn.Linear4bit(64, 64, False, torch.bfloat16, compress_statistics=False, quant_type="nf4").cuda()
    params = [torch.nn.Parameter(torch.randn(64, 128, device="cuda")) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.randn_like(param)
    one = x[:1]
    return {
        "quantize_4bit": lambda: library.functional.quantize_4bit(x),
        "Linear4bit, one row": torch.no_grad()(lambda: layer(one)),
        f"AdamW8bit.step, {TENSORS} tensors": library.optim.AdamW8bit(params, lr=1e-3).step,
    }


def op_calls() -> Dict[str, Callable[[], Any]]:
    """Return calls of ops, and of torch's own product for comparison."""
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    nf4 = get_codebook("nf4", "cuda")
    packed, absmax = ops.quantize_4bit(x, nf4, 64)
    one = x[:1]
    return {
        "ops.quantize_4bit": lambda: ops.quantize_4bit(x, nf4, 64),
        "ops.gemm_4bit, one row": lambda: ops.gemm_4bit(one, packed, absmax, nf4, 64, 64, 64),
        "torch's F.linear, one row": lambda: torch.nn.functional.linear(one, x),
    }


def microseconds(call: Callable[[], Any], name: str) -> float:
    """Return the time of a call; few at once of those that take long, so that the device's queue does not fill."""
    return gpu_timing.host_microseconds(call, *((5, 40) if "step" in name else ()))


def main() -> None:
    """Measure, print a table and store the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    ours, theirs = (calls(importlib.import_module(library)) for library in ("bnb_core", "bitsandbytes"))
    ours.update(op_calls())
    times: Dict[str, List[List[float]]] = {name: [] for name in ours}
    for _ in range(ROUNDS):
        for name, of_round in times.items():
            of_round.append([microseconds(library[name], name) for library in (ours, theirs) if name in library])
    rows = []
    for name, of_rounds in times.items():
        best, *peers = map(min, zip(*of_rounds))
        rows.append({"work": name, "microseconds": best, "bitsandbytes": peers[0] if peers else None})
        print(f"{name:32} {best:7.1f} us" + (f"   bitsandbytes {peers[0]:7.1f} us" if peers else ""))
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": gpu_timing.machine(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
