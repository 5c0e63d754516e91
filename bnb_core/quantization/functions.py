"""The products as autograd functions that are applied by hand: `MatMul4Bit`, `MatMul8bitLt` and `MatMul8bitFp`.

`matmul_4bit` and `matmul` are what to call otherwise: they also leave out what no gradient needs.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch.autograd.function import once_differentiable

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.quantization.outputs import deliver
from bnb_core.quantization.products import (
    MatmulLtState,
    find_outliers,
    int8_gradients,
    keep_backends,
    quantize_weight,
    same_backends,
    save_int8,
    weight_arguments,
)
from bnb_core.quantization.state import QuantState

Gradients = Tuple[Optional[torch.Tensor], ...]


class MatMul4Bit(torch.autograd.Function):
    """`MatMul4Bit.apply(A, B, out, bias, quant_state)`: multiply by a 4-bit weight [N, K], A W^T + bias.

    The arguments are those of `matmul_4bit`. Gradients flow to A and bias; the weight has none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        out: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        quant_state: Optional[QuantState] = None,
    ) -> torch.Tensor:
        """Return the product."""
        ctx.weight = weight_arguments("MatMul4Bit", B, quant_state)
        keep_backends(ctx)
        return _delivered(ctx, "MatMul4Bit", ops.gemm_4bit(A, **ctx.weight, bias=bias), out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Gradients:
        """Return a gradient for each argument of `forward`."""
        with same_backends(ctx):
            grad_A = ops.gemm_4bit_transposed(grad_output, **ctx.weight) if ctx.needs_input_grad[0] else None
        grad_bias = grad_output.sum_to_size(grad_output.shape[-1]) if ctx.needs_input_grad[3] else None
        return grad_A, None, None, grad_bias, None


class MatMul8bitLt(torch.autograd.Function):
    """`MatMul8bitLt.apply(A, B, out, bias, state)`: multiply by a weight in int8 (LLM.int8, arXiv 2208.07339).

    The arguments are those of `matmul`, and so is what flows to A, B and bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        out: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        state: Optional[MatmulLtState] = None,
    ) -> torch.Tensor:
        """Return the product."""
        state = MatmulLtState() if state is None else state
        codes, absmax = quantize_weight("MatMul8bitLt", B, state)
        find_outliers("MatMul8bitLt", A, state)
        save_int8(ctx, A, B, codes, absmax, state.threshold)
        return _delivered(ctx, "MatMul8bitLt", ops.int8_linear(A, codes, absmax, bias, state.threshold), out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Gradients:
        """Return a gradient for each argument of `forward`."""
        needs_A, needs_B, _, needs_bias, _ = ctx.needs_input_grad
        grad_A, grad_B, grad_bias = int8_gradients(ctx, grad_output, (needs_A, needs_B, needs_bias))
        return grad_A, grad_B, None, grad_bias, None


class MatMul8bitFp(torch.autograd.Function):
    """`MatMul8bitFp.apply(A, B, out, bias, state)`: multiply by the values that an int8 weight stands for, A left as it is.

    The arguments are those of `matmul`. All of the weight is dequantized for each product. Gradients flow to A, B and bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        out: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        state: Optional[MatmulLtState] = None,
    ) -> torch.Tensor:
        """Return the product."""
        state = MatmulLtState() if state is None else state
        if state.threshold > 0.0:
            raise InvalidArgumentError(
                f"MatMul8bitFp: the state's threshold is {state.threshold}, but A is not quantized, so that no column of it is an "
                "outlier; set it to 0.0, or use MatMul8bitLt"
            )
        codes, absmax = quantize_weight("MatMul8bitFp", B, state)
        save_int8(ctx, A, B, codes, absmax, 0.0)
        weight = ops.int8_dequantize_rows(codes, absmax, A.dtype)
        return _delivered(ctx, "MatMul8bitFp", torch.nn.functional.linear(A, weight, bias), out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Gradients:
        """Return a gradient for each argument of `forward`."""
        needs_A, needs_B, _, needs_bias, _ = ctx.needs_input_grad
        grad_A, _, grad_bias = int8_gradients(ctx, grad_output, (needs_A, False, needs_bias))
        grad_B = None
        if needs_B:
            A = ctx.saved_tensors[0]
            rows = grad_output.reshape(-1, grad_output.shape[-1]), A.reshape(-1, A.shape[-1])
            grad_B = (rows[0].t() @ rows[1]).to(ctx.weight_dtype)
        return grad_A, grad_B, None, grad_bias, None


def _delivered(ctx: Any, function: str, result: torch.Tensor, out: Optional[torch.Tensor]) -> torch.Tensor:
    if out is not None:
        ctx.mark_dirty(out)
    return deliver(function, result, out)
