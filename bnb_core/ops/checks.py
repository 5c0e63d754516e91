"""Checks of arguments that several op families share. Each message names the value, what is accepted and what to do."""

from __future__ import annotations

from typing import Any, Optional

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.spec import BLOCKSIZES_4BIT, Nested

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require_float(op: str, name: str, tensor: torch.Tensor) -> None:
    """Refuse tensors other than float32, float16 and bfloat16."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise InvalidArgumentError(f"{op}: {name} is {tensor.dtype}; cast it to torch.float32, torch.float16 or torch.bfloat16")


def require_float_dtype(op: str, dtype: torch.dtype) -> None:
    """Refuse output dtypes other than float32, float16 and bfloat16."""
    if dtype not in FLOAT_DTYPES:
        raise InvalidArgumentError(f"{op}: dtype is {dtype}; it must be torch.float32, torch.float16 or torch.bfloat16")


def require_dtype(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor of another dtype."""
    if tensor.dtype != dtype:
        raise InvalidArgumentError(f"{op}: {name} is {tensor.dtype}; it must be {dtype}")


def require_shape(op: str, name: str, tensor: torch.Tensor, *shape: Any) -> None:
    """Refuse a tensor of another shape."""
    if tuple(tensor.shape) != shape:
        raise InvalidArgumentError(f"{op}: {name} has shape {list(tensor.shape)}; it must be {list(shape)}")


def require_numel(op: str, name: str, tensor: torch.Tensor, numel: Any, why: str) -> None:
    """Refuse a tensor with another number of elements."""
    if tensor.numel() != numel:
        raise InvalidArgumentError(f"{op}: {name} has {tensor.numel()} elements; {why} needs {numel}")


def require_codebook(op: str, codebook: torch.Tensor, entries: int) -> None:
    """Refuse codebooks that are not float32 of the right length."""
    require_dtype(op, "codebook", codebook, torch.float32)
    if codebook.numel() != entries:
        raise InvalidArgumentError(f"{op}: codebook has {codebook.numel()} entries; it must have {entries}")


def require_blocksize(op: str, blocksize: Any) -> None:
    """Refuse blocksizes that are not positive."""
    if blocksize < 1:
        raise InvalidArgumentError(f"{op}: blocksize is {blocksize}; it must be at least 1")


def require_blocksize_4bit(op: str, blocksize: Any) -> None:
    """Refuse blocksizes that 4-bit tensors do not have."""
    if blocksize not in BLOCKSIZES_4BIT:
        raise InvalidArgumentError(f"{op}: blocksize is {blocksize}; it must be one of {', '.join(map(str, BLOCKSIZES_4BIT))}")


def require_block_scales(op: str, absmax: torch.Tensor, blocks: Any, nested: Optional[Nested]) -> None:
    """Refuse block scales that do not fit the number of blocks, plain (float32) or nested (uint8)."""
    why = f"a tensor of {blocks} blocks"
    if nested is None:
        if absmax.dtype != torch.float32:
            hint = "; pass `nested` too, or dequantize the scales first" if absmax.dtype == torch.uint8 else ""
            raise InvalidArgumentError(f"{op}: absmax is {absmax.dtype}; without nested statistics it must be torch.float32{hint}")
    else:
        require_dtype(op, "absmax with nested statistics", absmax, torch.uint8)
        require_dtype(op, "nested.absmax", nested.absmax, torch.float32)
        require_dtype(op, "nested.offset", nested.offset, torch.float32)
        require_codebook(f"{op} (nested)", nested.codebook, 256)
        require_blocksize(f"{op} (nested)", nested.blocksize)
        require_numel(op, "nested.offset", nested.offset, 1, "one offset for all scales")
        require_numel(
            op, "nested.absmax", nested.absmax, ceil_div(blocks, nested.blocksize), f"{why}, {nested.blocksize} to a scale,"
        )
    require_numel(op, "absmax", absmax, blocks, why)


def require_row_scales(op: str, absmax: torch.Tensor, rows: Any, name: str = "absmax") -> None:
    """Refuse row scales that are not one float32 a row."""
    require_dtype(op, name, absmax, torch.float32)
    require_numel(op, name, absmax, rows, f"one scale for each of {rows} rows or columns")


def require_bias(op: str, bias: Optional[torch.Tensor], features: Any, dtype: torch.dtype) -> None:
    """Refuse a bias of another length or dtype than the output's."""
    if bias is not None:
        require_dtype(op, "bias", bias, dtype)
        require_shape(op, "bias", bias, features)


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Divide, rounding up."""
    return (numerator + denominator - 1) // denominator
