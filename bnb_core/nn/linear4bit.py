"""Linear layers with 4-bit weights (QLoRA, arXiv 2305.14314): `Linear4bit`, `LinearNF4`, `LinearFP4`."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.nn.module4bit import Module4bit, require_compute_dtype
from bnb_core.nn.parameters import Params4bit, plain_data
from bnb_core.quantization.codebooks import get_4bit_type


class Linear4bit(Module4bit, torch.nn.Linear):
    """A linear layer with a 4-bit weight.

    Load floating-point weights, then move the module to a device (`.to(device)`, `.cuda()`, `.cpu()`): that quantizes the weight.
    Or load a checkpoint of quantized weights, into a module in any state: a quantized weight is replaced, an unquantized one
    becomes quantized, and one on the meta device comes to the checkpoint's. Floating-point weights that are loaded into a quantized
    module are quantized. What is saved, bitsandbytes loads, and the other way round.

    The weight is multiplied in `compute_dtype`; without one, in the dtype of each input. The result has the input's dtype.
    Gradients flow to the input and to the bias; the weight has none.

    Args:
        input_features, output_features: size of the last dimension of input and output.
        bias: have one, of torch's default dtype.
        compute_dtype: float32, float16 or bfloat16.
        compress_statistics: quantize the block scales too ("double quantization").
        quant_type: "fp4", "nf4", or the name of another codebook of 16 values.
        quant_storage: dtype that the packed bytes are stored as. A floating-point one lets them be sharded with other parameters.
        device: where to make the unquantized weight; that does not quantize it.

    Shape:
        Input [..., input_features], output [..., output_features].

    Raises:
        InvalidArgumentError: a quant type or dtype that is not accepted.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: Optional[torch.dtype] = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        get_4bit_type(quant_type, "cpu")  # one that does not exist is refused now, not when the model moves
        require_compute_dtype(type(self).__name__, compute_dtype)
        super().__init__(input_features, output_features, bias, device)
        self.quant_storage = quant_storage
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias.

        Args:
            x: [..., input_features], floating-point; float32, float16 or bfloat16 unless the module has a compute dtype.

        Raises:
            NotQuantizedError: the weight has not been quantized.
            InvalidArgumentError: a dtype, shape or device of x that is not accepted.
        """
        weight, bias = self._parameter("weight"), self._parameter("bias")
        state = self._statistics(weight)
        if state is None:
            raise self._not_quantized()
        given = x.dtype
        if not given.is_floating_point:
            raise InvalidArgumentError(f"{type(self).__name__}: the input is {given}; cast it to a floating-point dtype")
        # Each call of a tensor's method takes a microsecond, so that none is made in vain.
        dtype = self._dtype_to_compute_in(given)
        if dtype != given:
            x = x.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        packed = plain_data(weight)
        if packed.dtype != torch.uint8:
            packed = self._bytes(packed)
        y = state.multiply(x, packed, bias)
        return y if dtype == given else y.to(given)

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Compute like inputs from now on in the dtype that `x` is computed in."""
        self.compute_dtype = self._dtype_to_compute_in(x.dtype)

    def _dtype_to_compute_in(self, dtype: torch.dtype) -> torch.dtype:
        if self.compute_dtype is None:
            return dtype
        # A compute dtype that was set later, and not declared to be, is for float16 inputs: the others are safe to compute in.
        return self.compute_dtype if self.compute_type_is_set or dtype not in (torch.float32, torch.bfloat16) else dtype

    def _weight_shape(self) -> Tuple[int, ...]:
        return self.out_features, self.in_features


class LinearNF4(Linear4bit):
    """`Linear4bit` with `quant_type="nf4"`: codes for quantiles of the normal distribution (QLoRA, arXiv 2305.14314)."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: Optional[torch.dtype] = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device)


class LinearFP4(Linear4bit):
    """`Linear4bit` with `quant_type="fp4"`: codes of a sign, two exponent bits and one fraction bit."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: Optional[torch.dtype] = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device)
