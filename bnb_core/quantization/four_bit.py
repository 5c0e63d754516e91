"""4-bit quantization: NF4, FP4 and any other codebook of 16 values (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.checks import require_blocksize_4bit
from bnb_core.quantization.blockwise import compress_scales
from bnb_core.quantization.codebooks import shared_codebook
from bnb_core.quantization.layout import as_bytes, as_storage, require_storage
from bnb_core.quantization.outputs import deliver
from bnb_core.quantization.state import QuantState

#: Elements that share a scale, and scales that share one of their own, where nothing else is asked for.
DEFAULT_BLOCKSIZE = 64
DEFAULT_QUANT_TYPE = "fp4"
NESTED_BLOCKSIZE = 256


def quantize_4bit(
    A: torch.Tensor,
    absmax: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: Optional[int] = None,
    compress_statistics: bool = False,
    quant_type: str = DEFAULT_QUANT_TYPE,
    quant_storage: torch.dtype = torch.uint8,
) -> Tuple[torch.Tensor, QuantState]:
    """Quantize to packed 4-bit codes, a block of elements at a time.

    Args:
        A: float32, float16 or bfloat16, any shape; n elements.
        absmax: tensor to fill with the state's absmax instead of a new one: float32 [blocks], or uint8 if `compress_statistics`.
        out: tensor to fill with the packed codes instead of a new one.
        blocksize: consecutive elements that share a scale: a power of two from 32 to 4096; by default 64.
        compress_statistics: quantize the scales too, in blocks of 256.
        quant_type: "nf4", "fp4", or any other name that `get_4bit_type` takes.
        quant_storage: dtype that the packed bytes are seen as; its size must divide their number.

    Returns:
        The packed codes, [(n + 1) // 2 / itemsize, 1] of `quant_storage`, and the state that dequantizes them.

    Raises:
        InvalidArgumentError: a dtype, shape, device, blocksize or quant type that is not accepted.
    """
    blocksize = DEFAULT_BLOCKSIZE if blocksize is None else blocksize
    require_blocksize_4bit("quantize_4bit", blocksize)
    require_storage("quantize_4bit", quant_storage, A.numel())
    codebook = shared_codebook(quant_type, A.device, 16)
    packed, scales = ops.quantize_4bit(A, codebook, blocksize)
    state = QuantState(scales, A.shape, codebook.clone(), blocksize, quant_type, A.dtype)
    if compress_statistics:
        compress_scales(state, NESTED_BLOCKSIZE)
    state.absmax = deliver("quantize_4bit", state.absmax, absmax, "absmax")
    return deliver("quantize_4bit", as_storage(packed, quant_storage), out), state


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: Optional[QuantState] = None,
    absmax: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: Optional[int] = None,
    quant_type: str = DEFAULT_QUANT_TYPE,
) -> torch.Tensor:
    """Dequantize packed 4-bit codes.

    Args:
        A: the packed codes, of any dtype and shape. As a row [1, bytes], the transposed view of the column that `quantize_4bit`
            returns, it gives the transposed result.
        quant_state: what `quantize_4bit` returned. Without it, `absmax` and `out` are needed.
        absmax: float32 [blocks]. Only without `quant_state`.
        out: tensor to fill instead of a new one. Without `quant_state`, its shape and dtype are those of the result.
        blocksize: the one that the codes were made with, by default 64; with `quant_state`, it may only repeat the state's.
        quant_type: the codebook's name; with `quant_state`, it may only repeat the state's.

    Returns:
        The state's shape and dtype, or those of `out`; transposed if A is.

    Raises:
        InvalidArgumentError: too few or contradictory arguments, or a dtype, shape, device, blocksize or quant type that is not
            accepted.
    """
    function = "dequantize_4bit"
    if quant_state is None:
        if absmax is None or out is None:
            raise InvalidArgumentError(f"{function}: without quant_state, both absmax and out are needed")
        codebook = shared_codebook(quant_type, A.device, 16)
        quant_state = QuantState(absmax, out.shape, codebook, blocksize or DEFAULT_BLOCKSIZE, quant_type, out.dtype)
    elif absmax is not None:
        raise InvalidArgumentError(f"{function}: quant_state has the absmax already; pass one of them")
    elif blocksize not in (None, quant_state.blocksize):
        raise InvalidArgumentError(
            f"{function}: blocksize is {blocksize}, that of quant_state is {quant_state.blocksize}; leave it out"
        )
    elif quant_type not in (DEFAULT_QUANT_TYPE, quant_state.quant_type):
        raise InvalidArgumentError(
            f"{function}: quant_type is {quant_type!r}, that of quant_state is {quant_state.quant_type!r}; leave it out"
        )
    result = ops.dequantize_4bit(
        as_bytes(A),
        quant_state.absmax,
        quant_state.code,
        quant_state.blocksize,
        quant_state.shape,
        quant_state.dtype,
        quant_state.nested_statistics,
        out=out,
    )
    transposed = A.dim() == 2 and A.shape[0] == 1 < A.shape[1] and result.dim() == 2
    return result.t() if transposed else result


def quantize_nf4(
    A: torch.Tensor,
    absmax: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: Optional[int] = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> Tuple[torch.Tensor, QuantState]:
    """Quantize to NF4: `quantize_4bit` with `quant_type="nf4"`."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: torch.Tensor,
    absmax: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: Optional[int] = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> Tuple[torch.Tensor, QuantState]:
    """Quantize to FP4: `quantize_4bit` with `quant_type="fp4"`."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: Optional[QuantState] = None,
    absmax: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: Optional[int] = None,
) -> torch.Tensor:
    """Dequantize NF4: `dequantize_4bit` with `quant_type="nf4"`. A state of another type is refused."""
    _require_type("dequantize_nf4", quant_state, "nf4")
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: Optional[QuantState] = None,
    absmax: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: Optional[int] = None,
) -> torch.Tensor:
    """Dequantize FP4: `dequantize_4bit` with `quant_type="fp4"`. A state of another type is refused."""
    _require_type("dequantize_fp4", quant_state, "fp4")
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def _require_type(function: str, state: Optional[QuantState], quant_type: str) -> None:
    if state is not None and state.quant_type != quant_type:
        raise InvalidArgumentError(f"{function}: quant_state is of type {state.quant_type!r}; use dequantize_4bit, which reads it")
