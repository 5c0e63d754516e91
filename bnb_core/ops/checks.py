"""Checks of arguments that several op families share. Each message names the value, what is accepted and what to do.

They read dtypes, shapes, devices and numbers, never the elements of a tensor, so that they hold for fake tensors too.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Tuple

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


def require_matrix(op: str, name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that has not two dimensions."""
    if tensor.dim() != 2:
        raise InvalidArgumentError(
            f"{op}: {name} has shape {list(tensor.shape)}; it must have two dimensions; flatten the others first"
        )


def require_features(op: str, name: str, tensor: torch.Tensor, features: Any) -> None:
    """Refuse tensors that are not floating-point, or whose rows have another length."""
    require_float(op, name, tensor)
    if tensor.dim() == 0 or tensor.shape[-1] != features:
        raise InvalidArgumentError(f"{op}: {name} has shape {list(tensor.shape)}; its last dimension must be {features}")


def require_numel(op: str, name: str, tensor: torch.Tensor, numel: Any, why: str) -> None:
    """Refuse a tensor with another number of elements. `why` names no size: in a string, a symbolic size becomes a constant."""
    if tensor.numel() != numel:
        raise InvalidArgumentError(f"{op}: {name} has {tensor.numel()} elements; it must have {numel}, {why}")


def require_sizes(op: str, **sizes: Any) -> None:
    """Refuse negative sizes."""
    for name, size in sizes.items():
        if size < 0:
            raise InvalidArgumentError(f"{op}: {name} is {size}; it must be 0 or more")


def require_codebook(op: str, codebook: torch.Tensor, entries: int, name: str = "codebook") -> None:
    """Refuse codebooks that are not float32 of the right length."""
    require_dtype(op, name, codebook, torch.float32)
    require_shape(op, name, codebook, entries)


def require_blocksize(op: str, blocksize: Any, name: str = "blocksize") -> None:
    """Refuse blocksizes that are not positive."""
    if blocksize < 1:
        raise InvalidArgumentError(f"{op}: {name} is {blocksize}; it must be at least 1")


def require_blocksize_4bit(op: str, blocksize: Any) -> None:
    """Refuse blocksizes that 4-bit tensors do not have."""
    if blocksize not in BLOCKSIZES_4BIT:
        raise InvalidArgumentError(f"{op}: blocksize is {blocksize}; it must be one of {', '.join(map(str, BLOCKSIZES_4BIT))}")


def require_block_scales(op: str, absmax: torch.Tensor, blocks: Any) -> None:
    """Refuse block scales that are not one float32 a block."""
    require_dtype(op, "absmax", absmax, torch.float32)
    require_numel(op, "absmax", absmax, blocks, "one for each block")


def require_block_scales_4bit(op: str, absmax: torch.Tensor, blocks: Any, nested: Optional[Nested]) -> None:
    """Refuse block scales that do not fit the number of blocks, plain (float32) or nested (uint8)."""
    if nested is None:
        if absmax.dtype != torch.float32:
            hint = "; pass `nested` too, or dequantize the scales first" if absmax.dtype == torch.uint8 else ""
            raise InvalidArgumentError(f"{op}: absmax is {absmax.dtype}; without nested statistics it must be torch.float32{hint}")
    else:
        require_dtype(op, "absmax with nested statistics", absmax, torch.uint8)
        require_dtype(op, "nested.absmax", nested.absmax, torch.float32)
        require_codebook(op, nested.codebook, 256, "nested.codebook")
        require_dtype(op, "nested.offset", nested.offset, torch.float32)
        require_numel(op, "nested.offset", nested.offset, 1, "one offset for all scales")
        require_blocksize(op, nested.blocksize, "nested.blocksize")
        require_numel(op, "nested.absmax", nested.absmax, ceil_div(blocks, nested.blocksize), "one for nested.blocksize scales")
    require_numel(op, "absmax", absmax, blocks, "one for each block")


def require_row_scales(op: str, absmax: torch.Tensor, rows: Any, name: str = "absmax") -> None:
    """Refuse row scales that are not one float32 a row."""
    require_dtype(op, name, absmax, torch.float32)
    require_numel(op, name, absmax, rows, "one for each row or column")


def require_bias(op: str, bias: Optional[torch.Tensor], features: Any, dtype: torch.dtype) -> None:
    """Refuse a bias of another length or dtype than the output's."""
    if bias is not None:
        require_dtype(op, "bias", bias, dtype)
        require_shape(op, "bias", bias, features)


def require_dense(op: str, tensors: Sequence[torch.Tensor], names: Callable[[], Sequence[str]]) -> None:
    """Refuse sparse and nested tensors, whose elements do not lie in memory by strides. `names` is asked for messages only."""
    for at, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            name = names()[at]
            raise InvalidArgumentError(f"{op}: {name} has layout {tensor.layout}; pass a dense tensor, as `{name}.to_dense()` is")
        if getattr(tensor, "is_nested", False):
            raise InvalidArgumentError(f"{op}: {names()[at]} is a nested tensor; pass its tensors one by one, or padded")


def require_one_device(op: str, tensors: Sequence[torch.Tensor], names: Callable[[], Sequence[str]]) -> None:
    """Refuse tensors that are not all on one device. `names` is asked for messages only."""
    for at, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            raise InvalidArgumentError(
                f"{op}: tensors are on different devices ({names()[0]} on {tensors[0].device}, {names()[at]} on {tensor.device}); "
                "move them to one"
            )


def require_out(op: str, name: str, out: Any, shape: Tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor to fill that does not fit the output, or that cannot be written to."""
    if not isinstance(out, torch.Tensor):
        raise InvalidArgumentError(f"{op}: out for {name} is {type(out).__name__}; pass a {dtype} tensor of shape {list(shape)}")
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or out.device != device:
        raise InvalidArgumentError(
            f"{op}: out for {name} is {out.dtype} {list(out.shape)} on {out.device}; it must be {dtype} {list(shape)} on {device}"
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise InvalidArgumentError(
            f"{op}: out for {name} requires grad, and no gradient passes through out; detach it or use torch.no_grad()"
        )
    if out.numel() and any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape)):
        raise InvalidArgumentError(
            f"{op}: out for {name} has strides {list(out.stride())}, so that elements share memory; pass an expanded tensor's clone"
        )


def ceil_div(numerator: Any, denominator: Any) -> Any:
    """Divide, rounding up."""
    return (numerator + denominator - 1) // denominator
