"""The linear layer with an int8 weight, `Linear8bitLt` (LLM.int8, arXiv 2208.07339)."""

from __future__ import annotations

from typing import Any, Tuple

import torch

from bnb_core.errors import InvalidArgumentError, NotQuantizedError
from bnb_core.nn.module8bit import Module8bit, ModuleState
from bnb_core.nn.parameters import Int8Params, plain_data
from bnb_core.ops import int8_linear
from bnb_core.quantization.products import MatmulLtState, matmul


class Linear8bitLt(Module8bit, torch.nn.Linear):
    """A linear layer that multiplies in int8.

    Without `has_fp16_weights`, load floating-point weights, then move the module to a device (`.to(device)`, `.cuda()`, `.cpu()`):
    that quantizes the weight. Or load a checkpoint of quantized weights, into a module in any state. Floating-point weights that
    are loaded into a quantized module are quantized. What is saved, bitsandbytes loads, and the other way round. A weight that has
    not been quantized yet, or is to stay in floating point, is quantized for each product.

    The input's rows are quantized in each product, and the result has the input's dtype. Gradients flow to the input, to the bias,
    and to a floating-point weight.

    Args:
        input_features, output_features: size of the last dimension of input and output.
        bias: have one, of torch's default dtype.
        has_fp16_weights: keep the weight in floating point, of any dtype, and train it.
        threshold: columns of the input with any |x| >= threshold are multiplied in floating point; 0.0 for none. The paper has 6.0.
        index: None.
        device: where to make the unquantized weight; that does not quantize it.

    Attributes:
        state: a `MatmulLtState` of which, once the weight is quantized, `CB` is its codes and `SCB` the absmax of its rows,
            float32 [output_features].

    Shape:
        Input [..., input_features], output [..., output_features].

    Raises:
        InvalidArgumentError: a negative threshold, or an index.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: None = None,
        device: Any = None,
    ) -> None:
        if not threshold >= 0.0:
            raise InvalidArgumentError(f"Linear8bitLt: threshold is {threshold}; it must be 0.0 (no outliers) or positive")
        if index is not None:
            raise InvalidArgumentError("Linear8bitLt: index must be None; no weight here has its columns in another order")
        super().__init__(input_features, output_features, bias, device)
        self.index = index
        self.state = ModuleState(self, threshold, has_fp16_weights)
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias.

        Args:
            x: float32, float16 or bfloat16 [..., input_features].

        Raises:
            NotQuantizedError: the weight is codes without scales.
            InvalidArgumentError: a dtype, shape or device of x that is not accepted.
        """
        weight, bias, threshold = self._parameter("weight"), self._parameter("bias"), self.state.threshold
        if weight.dtype != torch.int8:
            return matmul(x, weight, bias=bias, state=MatmulLtState(threshold=threshold))
        absmax = self._statistics(weight)
        if absmax is None:
            raise NotQuantizedError(
                "Linear8bitLt: the weight is int8 codes without their scales; load a checkpoint that has SCB, or set weight.SCB"
            )
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return int8_linear(x, plain_data(weight), absmax, bias, threshold)

    def train(self, mode: bool = True) -> "Linear8bitLt":
        """Set training mode, as in any module; `state.is_training` says the same."""
        self.state.is_training = mode
        return super().train(mode)

    def init_8bit_state(self) -> None:
        """Leave the codes and scales of the weight to `state` alone, as bitsandbytes does at the first call. Never necessary."""
        if self.weight.SCB is not None:
            self.state.SCB = self.weight.SCB
            self.weight.CB = self.weight.SCB = None

    def _weight_shape(self) -> Tuple[int, ...]:
        return self.out_features, self.in_features
