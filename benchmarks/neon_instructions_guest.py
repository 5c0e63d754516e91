"""The calls that `neon_instructions.py` counts the instructions of: runs in the emulated Python, as `... guest.py PACKAGE OUT`.

PACKAGE is bnb_core or bitsandbytes: what is called has the same name in both. Each call is made once before it is counted.
"""

import ctypes
import importlib
import json
import sys
from functools import partial

import torch

MARK, GETPRIORITY = 0x1A5C, 141
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_libc = ctypes.CDLL(None)


def calls(bnb, N, K):
    """Yield the name and the function of each call on a weight [N, K]."""
    functional = importlib.import_module(f"{bnb.__name__}.functional")
    weight = torch.randn(N, K)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    codes, state8 = functional.quantize_blockwise(weight, blocksize=256)
    linear_map = torch.linspace(-1, 1, 256)
    yield "quantize_4bit", lambda: functional.quantize_4bit(weight, quant_type="nf4")
    yield "dequantize_4bit", lambda: functional.dequantize_4bit(packed, state)
    yield "quantize_blockwise", lambda: functional.quantize_blockwise(weight, blocksize=256)
    yield "quantize_blockwise linear map", lambda: functional.quantize_blockwise(weight, code=linear_map, blocksize=256)
    yield "dequantize_blockwise", lambda: functional.dequantize_blockwise(codes, state8)
    for name, dtype in DTYPES.items():
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, compress_statistics=False, quant_type="nf4")
        layer = layer.to("cpu")
        for M in (1, 16, 64):
            x = torch.randn(M, K).to(dtype)
            yield f"Linear4bit {name} M={M}", partial(layer, x)
            if bnb.__name__ == "bnb_core":
                with importlib.import_module("bnb_cpu_neon").use_precision("fast"):
                    yield f"Linear4bit fast {name} M={M}", partial(layer, x)
    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    for M in (1, 16, 64):
        yield f"Linear8bitLt fp16 M={M}", partial(layer, torch.randn(M, K).half())
    for name in ("AdamW8bit", "Lion8bit"):
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = torch.randn(N, K)
        yield f"{name}.step", getattr(bnb.optim, name)([parameter], lr=1e-3).step


def main(package, out):
    """Make every call, and say in `out` in which order."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = []
    with torch.no_grad():
        for N, K in ((1024, 1024), (1000, 1003)):
            for name, call in calls(importlib.import_module(package), N, K):
                call()
                for counted in (lambda: None, call):
                    _libc.syscall(GETPRIORITY, MARK, 0)
                    counted()
                _libc.syscall(GETPRIORITY, MARK, 0)
                made.append((f"{N}x{K}", name, N * K))
                with open(out, "w", encoding="utf-8") as file:
                    json.dump(made, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
