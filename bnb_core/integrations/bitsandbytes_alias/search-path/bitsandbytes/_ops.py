"""`torch.ops.bitsandbytes.*`, for code that calls bitsandbytes' ops directly. They need torch 2.4, as those of bnb_core do.

As in bitsandbytes, none of them has a derivative: `matmul` and `matmul_4bit` are there for that.
"""

from typing import Any, Callable, Optional, Sequence, Tuple

import torch

from bnb_core import functional as F
from bnb_core import ops
from bnb_core.ops.plain import REGISTERED, ordinary_execution
from bnb_core.quantization.codebooks import shared_codebook
from bnb_core.quantization.layout import as_bytes
from bnb_core.quantization.products import matmul_4bit

#: Scales of 4-bit blocks that share one of their own.
_NESTED_BLOCKSIZE = 256

_Function = Callable[..., Any]
_library = torch.library.Library("bitsandbytes", "DEF") if REGISTERED else None


def _op(schema: str, fake: Optional[_Function] = None) -> Callable[[_Function], _Function]:
    """Register the decorated function under a schema.

    Args:
        schema: name and signature.
        fake: returns outputs of the right shapes for fake tensors, where the function itself cannot.
    """

    def register(function: _Function) -> _Function:
        if _library is not None:
            name = schema[: schema.index("(")]
            without_gradient = torch.no_grad()(function)
            _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(name, without_gradient, "CompositeExplicitAutograd")
            torch.library.register_fake(f"bitsandbytes::{name}", fake or without_gradient, lib=_library)
        return function

    return register


def _some(like: torch.Tensor) -> torch.Tensor:
    """Return fake indices, of which only running the op can tell how many there are."""
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------------------------- int8


def _fake_vectorwise_quant(A: torch.Tensor, threshold: float = 0.0) -> Tuple[Any, ...]:
    codes, absmax, _ = F.int8_vectorwise_quant(A)
    return codes, absmax, _some(A) if threshold > 0.0 else None


@_op("int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)", _fake_vectorwise_quant)
def _int8_vectorwise_quant(A: torch.Tensor, threshold: float = 0.0) -> Tuple[Any, ...]:
    return F.int8_vectorwise_quant(A, threshold)


def _fake_double_quant(A: torch.Tensor, threshold: float = 0.0) -> Tuple[Any, ...]:
    outputs = F.int8_double_quant(A)
    return (*outputs[:4], _some(A) if threshold > 0.0 else None)


@_op("int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)", _fake_double_quant)
def _int8_double_quant(A: torch.Tensor, threshold: float = 0.0) -> Tuple[Any, ...]:
    return F.int8_double_quant(A, threshold=threshold)


@_op("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor")
def _int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    return F.int8_vectorwise_dequant(A, stats)


@_op("int8_linear_matmul(Tensor A, Tensor B) -> Tensor")
def _int8_linear_matmul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return F.int8_linear_matmul(A, B)


@_op("int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> ()")
def _int8_linear_matmul_out(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor) -> None:
    F.int8_linear_matmul(A, B, out)


@_op("int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor")
def _int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: Optional[torch.dtype] = None,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    out = torch.empty(A.shape, dtype=dtype or torch.float16, device=A.device)
    return F.int8_mm_dequant(A, row_stats, col_stats, out, bias)


@_op("int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor")
def _int8_scaled_mm(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    return _int8_mm_dequant(F.int8_linear_matmul(A, B), row_stats, col_stats, dtype, bias)


def _fake_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    columns = A.new_empty(0) if outlier_cols is None else A.new_empty(A.shape[0], outlier_cols.shape[0])
    return _int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype), columns


@_op(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) "
    "-> (Tensor, Tensor?)",
    _fake_mixed_scaled_mm,
)
def _int8_mixed_scaled_mm(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    product = _int8_scaled_mm(CA, CB, SCA, SCB, bias, A.dtype)
    if outlier_cols is None:
        return product, A.new_empty(0)
    columns = A[:, outlier_cols]
    weight = ops.int8_dequantize_rows(CB[:, outlier_cols], SCB, A.dtype)
    return product + torch.nn.functional.linear(columns, weight), columns


# --------------------------------------------------------------------------------------------------------------- 8-bit blocks


@_op("quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)")
def _quantize_blockwise(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> Tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_blockwise(A, code, blocksize)


@_op("dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor")
def _dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    return ops.dequantize_blockwise(A, absmax, code, blocksize, dtype)


@_op("dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor! out) -> ()")
def _dequantize_blockwise_out(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype, out: torch.Tensor
) -> None:
    ops.dequantize_blockwise(A, absmax, code, blocksize, dtype, out=out)


# ------------------------------------------------------------------------------------------------------------------------ 4 bits


@_op("quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)")
def _quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> Tuple[torch.Tensor, torch.Tensor]:
    packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage)
    return packed, state.absmax


def _dequantized_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    codebook = shared_codebook(quant_type, A.device, 16)
    return ops.dequantize_4bit(as_bytes(A), absmax, codebook, blocksize, shape, dtype, None, out=out)


_DEQUANTIZE_4BIT = "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_op(f"dequantize_4bit({_DEQUANTIZE_4BIT}) -> Tensor")(_dequantized_4bit)


@_op(f"dequantize_4bit.out({_DEQUANTIZE_4BIT}, Tensor! out) -> ()")
def _dequantize_4bit_out(*args: Any) -> None:
    _dequantized_4bit(*args)


@_op(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
def _gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: Optional[torch.Tensor] = None,
    absmax_8bit: Optional[torch.Tensor] = None,
    absmax_code: Optional[torch.Tensor] = None,
    absmax_offset: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    state = F.QuantState(absmax, torch.Size(shapeB), shared_codebook(quant_type, A.device, 16), blocksize, quant_type, A.dtype)
    if absmax_8bit is not None:
        second = F.QuantState(absmax, code=absmax_code, blocksize=_NESTED_BLOCKSIZE)
        state.absmax, state.state2, state.offset, state.nested = absmax_8bit, second, absmax_offset, True
    return matmul_4bit(A, B, state, bias=bias)


def _product_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    return F.gemv_4bit(A, B, out, state=F.QuantState(absmax, torch.Size(shapeB), code, blocksize, dtype=A.dtype))


_GEMV_4BIT = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"
_op(f"gemv_4bit({_GEMV_4BIT}) -> Tensor")(_product_4bit)


@_op(f"gemv_4bit.out({_GEMV_4BIT}, Tensor! out) -> ()")
def _gemv_4bit_out(*args: Any) -> None:
    _product_4bit(*args)


# -------------------------------------------------------------------------------------------------------------------- optimizers


@_op(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, float eps, "
    "float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()"
)
def _optimizer_update_32bit(
    optimizer_name: str,
    g: torch.Tensor,
    p: torch.Tensor,
    state1: torch.Tensor,
    state2: Optional[torch.Tensor],
    unorm_vec: Optional[torch.Tensor],
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    if max_unorm > 0.0 and ordinary_execution():  # fake tensors have no norm
        # What bnb_core limits an update by is the norm that it finds, which the caller's may differ from.
        norm = float(p.float().norm())
        max_unorm *= param_norm / norm if norm else 1.0
    F.optimizer_update_32bit(
        optimizer_name,
        g,
        p,
        state1,
        beta1,
        eps,
        step,
        lr,
        state2,
        beta2,
        beta3,
        alpha,
        weight_decay,
        gnorm_scale,
        unorm_vec,
        max_unorm,
        skip_zeros,
    )


_op(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, "
    "Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()"
)(F.optimizer_update_8bit_blockwise)
