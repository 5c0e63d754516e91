"""Products with quantized weights: `matmul_4bit` and `gemv_4bit`, and LLM.int8() as `matmul` with its `MatmulLtState`."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, ContextManager, Dict, Optional, Tuple

import torch
from torch.autograd.function import once_differentiable

from bnb_core import ops
from bnb_core.backends import selection
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.checks import require_bias
from bnb_core.ops.plain import ordinary_execution
from bnb_core.quantization.int8 import as_rows
from bnb_core.quantization.layout import as_bytes
from bnb_core.quantization.outputs import deliver
from bnb_core.quantization.state import QuantState

# ------------------------------------------------------------------------------------------------------------------------- 4 bits


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Multiply by a 4-bit weight: A W^T + bias. Differentiable in A and bias.

    Args:
        A: float32, float16 or bfloat16 [..., K].
        B: the packed weight as `quantize_4bit` returns it, or its transposed view; `quant_state` says what shape it has.
        quant_state: the state of a weight [N, K]. A state of shape [K, N], K != N, is taken for the transposed weight, which is
            deprecated.
        out: tensor to fill instead of a new one, [..., N] in A's dtype.
        bias: [N] in A's dtype.

    Returns:
        [..., N] in A's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape or device that is not accepted.
    """
    weight = weight_arguments("matmul_4bit", B, quant_state)
    N, K = quant_state.shape
    if A.dim() and A.shape[-1] == N != K:
        if ordinary_execution():
            warnings.warn(
                f"matmul_4bit: the weight was quantized from a tensor of shape [K, N] = [{N}, {K}]. Re-quantize from the weight "
                "[N, K] (out_features, in_features); bitsandbytes will refuse this shape.",
                DeprecationWarning,
                stacklevel=2,
            )
        require_bias("matmul_4bit", bias, K, A.dtype)
        result = ops.gemm_4bit_transposed(A, **weight)
        return deliver("matmul_4bit", result if bias is None else result + bias, out)
    if out is None or _needs_grad(A, bias):
        return deliver("matmul_4bit", ops.gemm_4bit(A, **weight, bias=bias), out)
    return ops.gemm_4bit(A, **weight, bias=bias, out=out)


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: Optional[torch.Tensor] = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: Optional[QuantState] = None,
) -> torch.Tensor:
    """Multiply vectors by a 4-bit weight: A W^T.

    Args:
        A: float32, float16 or bfloat16 [..., K].
        B: the packed weight as `quantize_4bit` returns it, or its transposed view.
        out: tensor to fill instead of a new one, [..., N] in A's dtype.
        transposed_A, transposed_B: False; transpose the tensors instead.
        state: the state of a weight [N, K].

    Returns:
        [..., N] in A's dtype.

    Raises:
        InvalidArgumentError: no state, or a dtype, shape or device that is not accepted.
    """
    if transposed_A or transposed_B:
        raise InvalidArgumentError("gemv_4bit: transposed_A and transposed_B must be False; transpose the tensors instead")
    return ops.gemm_4bit(A, **weight_arguments("gemv_4bit", B, state), out=out)


def weight_arguments(function: str, B: torch.Tensor, state: Optional[QuantState]) -> Dict[str, Any]:
    """Return the packed weight, its statistics and its shape by the names that ops give them."""
    if state is None:
        raise InvalidArgumentError(f"{function}: the state of the weight is None; pass the one that quantize_4bit returned")
    if state.shape is None or len(state.shape) != 2:
        shape = None if state.shape is None else list(state.shape)
        raise InvalidArgumentError(f"{function}: the state's shape is {shape}; it must be that of a matrix, [N, K]")
    N, K = state.shape
    return {
        "packed": as_bytes(B),
        "absmax": state.absmax,
        "codebook": state.code,
        "blocksize": state.blocksize,
        "N": N,
        "K": K,
        "nested": state.nested_statistics,
    }


def _needs_grad(*tensors: Optional[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# ------------------------------------------------------------------------------------------------------------------------- 8 bits

_DEPRECATED = ("CxB", "CxBt", "formatB", "_tile_indices")


class MatmulLtState:
    """The quantized weight of `matmul`, and how to use it.

    Args:
        CB, SCB, idx, threshold, has_fp16_weights: see the attributes.
        force_no_igemmlt, SB, SBt, CBt, subB, outlier_pool: left out, because nothing depends on them.

    Attributes:
        CB: int8 [N, K], codes of the weight. `matmul` quantizes the weight where they are missing.
        SCB: float32 [N], absmax of its rows.
        threshold: columns of the input with any |x| >= threshold are multiplied in the input's dtype; 0.0 for none.
        has_fp16_weights: the weight is kept and trained in floating point, and quantized at each call; otherwise once.
        idx: see the property.
        is_training, force_no_igemmlt, SB, SBt, CBt, subB, outlier_pool, has_accumulated_gradients, use_pool: nothing here depends
            on these; they are what code for bitsandbytes sets or reads.

    Raises:
        InvalidArgumentError: an argument that nothing depends on.
    """

    #: peft up to 0.13, the last for Python 3.8, reads it. bitsandbytes has had no other way to take gradients since 0.45.
    memory_efficient_backward = False

    def __init__(
        self,
        force_no_igemmlt: bool = False,
        CB: Optional[torch.Tensor] = None,
        SB: Optional[torch.Tensor] = None,
        SCB: Optional[torch.Tensor] = None,
        SBt: Optional[torch.Tensor] = None,
        CBt: Optional[torch.Tensor] = None,
        subB: Optional[torch.Tensor] = None,
        outlier_pool: Any = None,
        idx: Optional[torch.Tensor] = None,
        *,
        threshold: float = 0.0,
        has_fp16_weights: bool = True,
    ) -> None:
        unused = {"SB": SB, "SBt": SBt, "CBt": CBt, "subB": subB, "outlier_pool": outlier_pool}
        if force_no_igemmlt or any(value is not None for value in unused.values()):
            given = [*(["force_no_igemmlt"] if force_no_igemmlt else []), *(name for name in unused if unused[name] is not None)]
            raise InvalidArgumentError(f"MatmulLtState: nothing depends on {', '.join(given)}; pass CB, SCB and idx alone")
        self.CB = CB
        self.SCB = SCB
        self._outliers = idx  # a mask, or indices
        self.threshold = threshold
        self.has_fp16_weights = has_fp16_weights
        self.is_training = True
        self.use_pool = False
        self.has_accumulated_gradients = False
        self.force_no_igemmlt = False
        self.SB: Optional[torch.Tensor] = None
        self.SBt: Optional[torch.Tensor] = None
        self.CBt: Optional[torch.Tensor] = None
        self.subB: Optional[torch.Tensor] = None
        self.outlier_pool: Any = None

    def __getattr__(self, name: str) -> None:
        if name in _DEPRECATED:
            warnings.warn(f"MatmulLtState.{name} is deprecated; it is always None", FutureWarning, stacklevel=2)
            return
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in ("threshold", "has_fp16_weights", "is_training", "use_pool"))
        return f"{type(self).__name__}({shown})"

    def __eq__(self, other: object) -> bool:
        """Compare what a product depends on, and what the last one has found."""
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        names = ("CB", "SCB", "idx", "threshold", "has_fp16_weights", "is_training", "use_pool")
        return all(_equal(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def idx(self) -> Optional[torch.Tensor]:
        """Outlier columns of the last input, int64, in ascending order; None before a call with a threshold.

        Reading it synchronizes with the device, which alone knows how many there are.
        """
        outliers = self._outliers
        return outliers.nonzero().view(-1) if outliers is not None and outliers.dtype == torch.bool else outliers

    @idx.setter
    def idx(self, value: Optional[torch.Tensor]) -> None:
        self._outliers = value

    def reset_grads(self) -> None:
        """Forget the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return bool(a is b or (type(a) is type(b) is not torch.Tensor and a == b))


def matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: Optional[torch.Tensor] = None,
    state: Optional[MatmulLtState] = None,
    threshold: float = 0.0,
    bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Multiply by a weight in int8: A B^T + bias, the LLM.int8() way (arXiv 2208.07339).

    The gradient in A takes the dequantized weight. Where B is floating-point and requires a gradient, that is the product of the
    output's gradient and A, both quantized by columns; with a threshold it is taken in A's dtype.

    Args:
        A: float32, float16 or bfloat16 [..., K].
        B: the weight [N, K]; floating-point, or anything if `state` holds its codes and scales.
        out: tensor to fill instead of a new one, [..., N] in A's dtype.
        state: where the quantized weight is kept; by default it is quantized for this call.
        threshold: if not 0.0, the state's new threshold.
        bias: [N].

    Returns:
        [..., N] in A's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape, device or threshold that is not accepted.
    """
    state = MatmulLtState() if state is None else state
    if threshold != 0.0:
        state.threshold = threshold
    codes, absmax = quantize_weight("matmul", B, state)
    find_outliers("matmul", A, state)
    bias = None if bias is None else bias.to(A.dtype)
    if _needs_grad(B):
        result = _TrainedWeight.apply(A, B, bias, codes, absmax, state.threshold)
        return deliver("matmul", result, out)
    if out is None or _needs_grad(A, bias):
        return deliver("matmul", ops.int8_linear(A, codes, absmax, bias, state.threshold), out)
    return ops.int8_linear(A, codes, absmax, bias, state.threshold, out=out)


def quantize_weight(function: str, B: torch.Tensor, state: MatmulLtState) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and scales of a state, which are made from the weight unless it has them and keeps them."""
    if not (state.has_fp16_weights or state.CB is None or state.SCB is None):
        return state.CB, state.SCB
    if not B.is_floating_point():
        raise InvalidArgumentError(
            f"{function}: B is {B.dtype} and would have to be quantized; pass a floating-point weight, or set CB and SCB of the "
            "state, and has_fp16_weights to False"
        )
    state.reset_grads()
    state.CB, state.SCB, _ = ops.int8_quantize_rows(B.detach(), 0.0)
    return state.CB, state.SCB


def find_outliers(function: str, A: torch.Tensor, state: MatmulLtState) -> None:
    """Set the outlier columns of a state from the input, if it has a threshold."""
    if state.threshold > 0.0:
        state.idx = (as_rows(function, "A", A.detach()).abs() >= state.threshold).any(0)


class _TrainedWeight(torch.autograd.Function):
    """The product with the codes of a weight that has a gradient itself."""

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        bias: Optional[torch.Tensor],
        codes: torch.Tensor,
        absmax: torch.Tensor,
        threshold: float,
    ) -> torch.Tensor:
        save_int8(ctx, A, B, codes, absmax, threshold)
        return ops.int8_linear(A, codes, absmax, bias, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        return (*int8_gradients(ctx, grads[0], ctx.needs_input_grad[:3]), None, None, None)


def save_int8(ctx: Any, A: torch.Tensor, B: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, threshold: float) -> None:
    """Keep what `int8_gradients` needs, and the backends that compute the product."""
    ctx.save_for_backward(A, codes, absmax)
    ctx.threshold = threshold
    ctx.weight_dtype = B.dtype
    keep_backends(ctx)


def int8_gradients(ctx: Any, grad: torch.Tensor, needs: Tuple[bool, ...]) -> Tuple[Optional[torch.Tensor], ...]:
    """Return the gradients of input, weight and bias, where they are needed."""
    A, codes, absmax = ctx.saved_tensors
    with same_backends(ctx):
        grad_A = ops.int8_linear_transposed(grad, codes, absmax) if needs[0] else None
        grad_B = _weight_gradient(grad, A, ctx.threshold).to(ctx.weight_dtype) if needs[1] else None
    return grad_A, grad_B, grad.sum_to_size(grad.shape[-1]) if needs[2] else None


def keep_backends(ctx: Any) -> None:
    """Have a backward use the backends of its forward; where torch traces, a graph uses those of the process."""
    ctx.pinned = selection.current() if ordinary_execution() else None


def same_backends(ctx: Any) -> ContextManager[None]:
    """Use the backends that `keep_backends` has kept."""
    return contextlib.nullcontext() if ctx.pinned is None else selection.pinned(ctx.pinned)


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return grad^T x, of rows that are quantized by columns; with a threshold, in the dtype that they have."""
    grad, x = as_rows("matmul", "grad", grad), as_rows("matmul", "A", x)
    if threshold > 0.0:
        # Outlier columns need a product in full precision, and which they are is known only on the device: all of them take it.
        # CPUs multiply float16 slowly, or not at all in older torch.
        return grad.t().float() @ x.float() if x.device.type == "cpu" else grad.t() @ x
    # The threshold is spelled out, since torch.compile may take the default of a parameter for a number that changes.
    _, _, grad_codes, grad_absmax, _ = ops.int8_quantize_rows_cols(grad, 0.0)
    _, _, x_codes, x_absmax, _ = ops.int8_quantize_rows_cols(x, 0.0)
    product = ops.int8_matmul(grad_codes.t(), x_codes.t())
    return ops.int8_matmul_dequant(product, grad_absmax, x_absmax, None, x.dtype)
