"""The linear layer with an int8 weight, `Linear8bitLt` (LLM.int8, arXiv 2208.07339)."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Set

import torch

from bnb_core.errors import CheckpointError, InvalidArgumentError, NotQuantizedError
from bnb_core.nn.parameters import Int8Params, plain_data
from bnb_core.nn.quantized_module import QuantizedModule
from bnb_core.ops import int8_linear
from bnb_core.quantization.products import MatmulLtState, matmul

#: What a checkpoint's `weight_format` says of row-major codes, the only ones since bitsandbytes 0.46.
_ROW_FORMATS = (0, "row")


class Linear8bitLt(QuantizedModule, torch.nn.Linear):
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
        state: a `MatmulLtState` of which `SCB` is the absmax of the weight's rows, float32 [output_features], once it is quantized.

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
        self.state = MatmulLtState(
            threshold=threshold, has_fp16_weights=has_fp16_weights, use_pool=threshold > 0.0 and not has_fp16_weights
        )
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + bias.

        Args:
            x: float32, float16 or bfloat16 [..., input_features].

        Raises:
            NotQuantizedError: the weight is codes without scales.
            InvalidArgumentError: a dtype, shape or device of x that is not accepted.
        """
        weight, bias, threshold = self.weight, self.bias, self.state.threshold
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
            self.state.CB, self.state.SCB = self.weight.data, self.weight.SCB
            self.weight.CB = self.weight.SCB = None

    # ---------------------------------------------------------------------------------------------------------------- statistics

    def _statistics(self, weight: Any) -> Optional[torch.Tensor]:
        if weight.dtype != torch.int8:
            return None
        absmax = getattr(weight, "SCB", None)
        return self.state.SCB if absmax is None else absmax

    def _keep_statistics(self, statistics: torch.Tensor) -> None:
        weight, state = self.weight, self.state
        state.SCB = statistics
        if isinstance(weight, Int8Params):
            weight.SCB = None if weight.SCB is None else statistics
            weight.CB = None if weight.CB is None else weight.data
        state.CB = None if state.CB is None else weight.data

    def _map_statistics(self, statistics: torch.Tensor, move: Any) -> torch.Tensor:
        return move(statistics)

    def _adopt(self, weight: torch.Tensor) -> None:
        if isinstance(weight, Int8Params):
            self.state.CB, self.state.SCB = None, weight.SCB

    # --------------------------------------------------------------------------------------------------------------- checkpoints

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        absmax = self._statistics(self.weight)
        if absmax is not None:
            destination[f"{prefix}SCB"] = absmax if keep_vars else absmax.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _load_weight(self, entries: Dict[str, Any], assign: bool, missing: List[str], errors: List[str]) -> Set[str]:
        source, weight = entries["weight"].data, self.weight
        done = {"weight_format"} & set(entries)
        _require_row_format(entries.get("weight_format", "row"))
        if source.dtype == torch.int8:
            done |= {"SCB"} & set(entries)
        if tuple(source.shape) != (self.out_features, self.in_features):
            return done
        if source.dtype != torch.int8:
            quantized = self._statistics(self.weight) is not None
            if not isinstance(weight, Int8Params) or not (assign or quantized):
                return done
            new = weight._like(source if assign else source.clone(), CB=None, SCB=None)
            self._replace_weight(new.to(weight.device) if quantized else new, assign)
            return {"weight", *done}
        if "SCB" not in done:
            missing.append("SCB")
            return {"weight", *done}
        absmax = self._checked_scales(entries["SCB"])
        device = source.device if assign or weight.is_meta else weight.device
        codes, absmax = (tensor.to(device, copy=not assign) for tensor in (source, absmax))
        self._replace_weight(Int8Params(codes, requires_grad=False, CB=codes, SCB=absmax), assign)
        return {"weight", *done}

    def _checked_scales(self, absmax: Any) -> torch.Tensor:
        if self.state.has_fp16_weights:
            raise CheckpointError(
                "the checkpoint has int8 codes, but the module keeps its weight in floating point; "
                "construct it with has_fp16_weights=False"
            )
        if not isinstance(absmax, torch.Tensor) or absmax.dtype != torch.float32 or tuple(absmax.shape) != (self.out_features,):
            found = f"{absmax.dtype} {list(absmax.shape)}" if isinstance(absmax, torch.Tensor) else f"a {type(absmax).__name__}"
            raise CheckpointError(f"SCB is {found}; it must be torch.float32 [{self.out_features}]")
        return absmax


def _require_row_format(weight_format: Any) -> None:
    if isinstance(weight_format, torch.Tensor):
        weight_format = weight_format.tolist()
    if weight_format not in _ROW_FORMATS:
        raise CheckpointError(
            f"weight_format is {weight_format!r}; only row-major codes, 0 or 'row', can be loaded. Save the model again with "
            "bitsandbytes 0.45, which can still read the others"
        )
