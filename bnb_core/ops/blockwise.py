"""8-bit blockwise ops: shapes, checks and signatures of `quantize_blockwise` and `dequantize_blockwise`."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import torch

from bnb_core.ops import checks
from bnb_core.ops.outputs import Output
from bnb_core.ops.structured import StructuredOp


def _quantize_meta(x: torch.Tensor, codebook: torch.Tensor, blocksize: int) -> Sequence[Output]:
    op = "quantize_blockwise"
    checks.require_float(op, "x", x)
    checks.require_codebook(op, codebook, 256)
    checks.require_blocksize(op, blocksize)
    return (x.shape, torch.uint8), ((checks.ceil_div(x.numel(), blocksize),), torch.float32)


def _dequantize_meta(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> Sequence[Output]:
    op = "dequantize_blockwise"
    checks.require_dtype(op, "codes", codes, torch.uint8)
    checks.require_codebook(op, codebook, 256)
    checks.require_blocksize(op, blocksize)
    checks.require_block_scales(op, absmax, checks.ceil_div(codes.numel(), blocksize))
    checks.require_float_dtype(op, dtype)
    return ((codes.shape, dtype),)


_quantize = StructuredOp("quantize_blockwise", _quantize_meta)
_dequantize = StructuredOp("dequantize_blockwise", _dequantize_meta)


def quantize_blockwise(
    x: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    *,
    out: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Quantize to 8-bit codes with one scale a block (arXiv 2110.02861).

    Args:
        x: float32, float16 or bfloat16, any shape.
        codebook: float32 [256].
        blocksize: consecutive elements that share a scale; at least 1.
        out: tensors to fill instead of new ones.

    Returns:
        codes, uint8 of x's shape, and absmax, float32 [ceil(n / blocksize)].

    Raises:
        InvalidArgumentError: a dtype, shape, device or blocksize that is not accepted.
    """
    return _quantize.call((x, codebook, blocksize), out)


def dequantize_blockwise(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    dtype: torch.dtype,
    *,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Dequantize 8-bit codes.

    Args:
        codes: uint8, any shape.
        absmax: float32 [ceil(n / blocksize)].
        codebook: float32 [256].
        blocksize: the one that `codes` were made with.
        dtype: float32, float16 or bfloat16.
        out: tensor to fill instead of a new one.

    Returns:
        Values of `dtype`, in the shape of `codes`.

    Raises:
        InvalidArgumentError: a dtype, shape, device or blocksize that is not accepted.
    """
    return _dequantize.call((codes, absmax, codebook, blocksize, dtype), out)
