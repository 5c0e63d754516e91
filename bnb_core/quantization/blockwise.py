"""8-bit blockwise quantization, and the quantization of block scales that builds on it."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.quantization.codebooks import shared_codebook
from bnb_core.quantization.outputs import deliver
from bnb_core.quantization.state import QuantState

#: Elements that share a scale where nothing else is asked for.
DEFAULT_BLOCKSIZE = 4096


def quantize_blockwise(
    A: torch.Tensor,
    code: Optional[torch.Tensor] = None,
    absmax: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: int = DEFAULT_BLOCKSIZE,
    nested: bool = False,
) -> Tuple[torch.Tensor, QuantState]:
    """Quantize to 8-bit codes, a block of elements at a time (arXiv 2110.02861).

    Args:
        A: float32, float16 or bfloat16, any shape.
        code: the codebook, float32 [256], in any order; by default the signed dynamic map.
        absmax: tensor to fill with the state's absmax instead of a new one: float32 [blocks], or uint8 if `nested`.
        out: tensor to fill with the codes instead of a new one: uint8 of A's shape.
        blocksize: consecutive elements that share a scale; at least 1.
        nested: quantize the scales too, in blocks of the same size.

    Returns:
        The codes, uint8 of A's shape, and the state that dequantizes them.

    Raises:
        InvalidArgumentError: a dtype, shape, device or blocksize that is not accepted.
    """
    codebook = shared_codebook("dynamic", A.device, 256) if code is None else code.to(A.device)
    codes, scales = ops.quantize_blockwise(A, codebook, blocksize)
    state = QuantState(scales, code=codebook.clone(), blocksize=blocksize, dtype=A.dtype)
    if nested:
        compress_scales(state, blocksize)
    state.absmax = deliver("quantize_blockwise", state.absmax, absmax, "absmax")
    return deliver("quantize_blockwise", codes, out), state


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: Optional[QuantState] = None,
    absmax: Optional[torch.Tensor] = None,
    code: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    blocksize: int = DEFAULT_BLOCKSIZE,
    nested: bool = False,
) -> torch.Tensor:
    """Dequantize 8-bit codes.

    Args:
        A: the codes, uint8, any shape.
        quant_state: what `quantize_blockwise` returned. Without it, `absmax` is needed.
        absmax: float32 [blocks]. Only without `quant_state`.
        code: the codebook, float32 [256]; by default the signed dynamic map. Only without `quant_state`.
        out: tensor to fill instead of a new one. Without `quant_state`, its dtype is that of the result.
        blocksize: the one that the codes were made with; with `quant_state`, it may only repeat the state's.
        nested: True asserts that `quant_state` has nested scales, which are recognized in any case.

    Returns:
        A's shape, in the state's dtype; without a state in that of `out`, or float32.

    Raises:
        InvalidArgumentError: neither or both of `quant_state` and `absmax`, a blocksize that is not the state's, or a dtype, shape
            or device that is not accepted.
    """
    function = "dequantize_blockwise"
    if quant_state is None:
        if absmax is None:
            raise InvalidArgumentError(f"{function}: neither quant_state nor absmax is given; pass one of them")
        codebook = shared_codebook("dynamic", A.device, 256) if code is None else code.to(A.device)
        dtype = torch.float32 if out is None else out.dtype
        quant_state = QuantState(absmax, code=codebook, blocksize=blocksize, dtype=dtype)
    elif absmax is not None or code is not None:
        raise InvalidArgumentError(f"{function}: quant_state has the absmax and the code already; pass it, or them")
    elif blocksize not in (DEFAULT_BLOCKSIZE, quant_state.blocksize):
        raise InvalidArgumentError(
            f"{function}: blocksize is {blocksize}, that of quant_state is {quant_state.blocksize}; leave it out"
        )
    if nested and not quant_state.nested:
        raise InvalidArgumentError(f"{function}: nested is True, but the scales are not quantized; leave it out")
    return ops.dequantize_blockwise(
        A, dequantize_scales(quant_state), quant_state.code, quant_state.blocksize, quant_state.dtype, out=out
    )


def compress_scales(state: QuantState, blocksize: int) -> None:
    """Quantize the scales of a state ("double quantization"; QLoRA, arXiv 2305.14314), in place.

    Their mean is subtracted first. It is taken in float64, so that it does not depend on the order of summation.

    Args:
        state: not nested; its absmax is replaced.
        blocksize: scales that share a scale of their own.
    """
    scales = state.absmax
    # No scales, no mean; their offset is never used.
    state.offset = scales.double().mean().float() if scales.numel() else scales.new_zeros(())
    state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=blocksize)
    state.nested = True


def dequantize_scales(state: QuantState) -> torch.Tensor:
    """Return the scales of a state, float32 [blocks], whether they are nested or not."""
    nested = state.nested_statistics
    if nested is None:
        return state.absmax
    scales = ops.dequantize_blockwise(state.absmax, nested.absmax, nested.codebook, nested.blocksize, torch.float32)
    return scales + nested.offset
