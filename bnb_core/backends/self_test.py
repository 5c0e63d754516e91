"""Run one small op on a backend and compare it with an answer worked out by hand."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

import torch

from bnb_core import ops
from bnb_core.backends import selection
from bnb_core.backends.api import Backend, Call, dtype_name
from bnb_core.errors import BackendError
from bnb_core.ops.spec import OPS


def _codebook() -> torch.Tensor:
    return torch.arange(-8.0, 8.0) / 8


def _int8_matmul() -> Tuple[Tuple[Any, ...], torch.dtype, torch.Tensor]:
    a = torch.tensor([[1, -2, 3], [127, -127, 0]], dtype=torch.int8)
    b = torch.tensor([[4, 5, -6], [127, 127, 1]], dtype=torch.int8)
    return (a, b), torch.int8, torch.tensor([[-24, -124], [-127, 0]], dtype=torch.int32)


def _dequantize_4bit() -> Tuple[Tuple[Any, ...], torch.dtype, torch.Tensor]:
    packed = torch.tensor([0x0C, 0xF0], dtype=torch.uint8)  # codes 0, 12, 15: -1, 0.5 and 0.875 times absmax 2
    args = (packed, torch.tensor([2.0]), _codebook(), 64, (3,), torch.float32, None)
    return args, torch.float32, torch.tensor([-2.0, 1.0, 1.75])


def _quantize_4bit() -> Tuple[Tuple[Any, ...], torch.dtype, torch.Tensor]:
    args = (torch.tensor([-2.0, 1.0, 1.75, 0.0]), _codebook(), 64)
    return args, torch.float32, torch.tensor([0x0C, 0xF8], dtype=torch.uint8)


#: The arguments of each op, the dtype that it dispatches by, and its first output.
CASES: Tuple[Tuple[str, Callable[[], Tuple[Tuple[Any, ...], torch.dtype, torch.Tensor]]], ...] = (
    ("dequantize_4bit", _dequantize_4bit),
    ("quantize_4bit", _quantize_4bit),
    ("int8_matmul", _int8_matmul),
)


def run(backend: Backend) -> Optional[str]:
    """Run the first op with a known answer that the backend has, and name it; None if it has none of them.

    Raises:
        BackendError: the answer is wrong. What the kernel itself raises passes.
    """
    for op, case in CASES:
        args, dtype, expected = case()
        kernel = backend.kernels.get(op)
        if kernel is None or kernel.refusal_of(Call(OPS[op], args)):
            continue
        device = "cpu" if kernel.runs_on("cpu") else sorted(kernel.devices)[0]
        if kernel.refusal(device, dtype_name(dtype)):
            continue
        args = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in args)
        with selection.use_backend(backend):
            result = getattr(ops, op)(*args)
        first = (result[0] if isinstance(result, tuple) else result).cpu()
        if not torch.equal(first, expected):
            raise BackendError(f"{op} on {device} gave {first.tolist()} instead of {expected.tolist()}")
        return op
    return None
