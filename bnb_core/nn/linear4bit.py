"""Linear layers with 4-bit weights (QLoRA, arXiv 2305.14314): `Linear4bit`, `LinearNF4`, `LinearFP4`."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Set

import torch

from bnb_core.errors import InvalidArgumentError, NotQuantizedError
from bnb_core.nn.parameters import Params4bit, map_quant_state, plain_data
from bnb_core.nn.quantized_module import QuantizedModule
from bnb_core.ops import gemm_4bit
from bnb_core.ops.checks import FLOAT_DTYPES
from bnb_core.quantization.checkpoint import PACKED_PREFIX
from bnb_core.quantization.codebooks import get_4bit_type
from bnb_core.quantization.layout import as_bytes
from bnb_core.quantization.state import QuantState

#: Start of the name under which a checkpoint has the statistics that are not tensors.
_PACKED = f"weight.quant_state.{PACKED_PREFIX}"


class Linear4bit(QuantizedModule, torch.nn.Linear):
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
        if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
            raise InvalidArgumentError(
                f"{type(self).__name__}: compute_dtype is {compute_dtype}; it must be torch.float32, torch.float16 or "
                "torch.bfloat16, or None for the dtype of each input"
            )
        super().__init__(input_features, output_features, bias, device)
        self.quant_state: Optional[QuantState] = None
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
        weight, bias = self.weight, self.bias
        state = self._statistics(weight)
        if state is None:
            raise NotQuantizedError(
                f"{type(self).__name__}: the weight is not quantized; move the module to a device first, "
                "by .to(device), .cuda() or .cpu()"
            )
        if not x.is_floating_point():
            raise InvalidArgumentError(f"{type(self).__name__}: the input is {x.dtype}; cast it to a floating-point dtype")
        # Each call of a tensor's method takes a microsecond, so that none is made in vain.
        given = x.dtype
        dtype = self._dtype_to_compute_in(given)
        if dtype != given:
            x = x.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        packed = plain_data(weight)
        if packed.dtype != torch.uint8:
            packed = as_bytes(packed)
        N, K = state.shape
        y = gemm_4bit(x, packed, state.absmax, state.code, state.blocksize, N, K, bias, state.nested_statistics)
        return y if dtype == given else y.to(given)

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Compute like inputs from now on in the dtype that `x` is computed in."""
        self.compute_dtype = self._dtype_to_compute_in(x.dtype)

    def _dtype_to_compute_in(self, dtype: torch.dtype) -> torch.dtype:
        if self.compute_dtype is None:
            return dtype
        # A compute dtype that was set later, and not declared to be, is for float16 inputs: the others are safe to compute in.
        return self.compute_dtype if self.compute_type_is_set or dtype not in (torch.float32, torch.bfloat16) else dtype

    # ---------------------------------------------------------------------------------------------------------------- statistics

    def _statistics(self, weight: Any) -> Optional[QuantState]:
        if not getattr(weight, "bnb_quantized", True):
            return None
        state = getattr(weight, "quant_state", None)
        return self.quant_state if state is None else state

    def _keep_statistics(self, statistics: QuantState) -> None:
        self.quant_state = statistics
        if isinstance(self.weight, Params4bit):
            self.weight.quant_state = statistics

    def _map_statistics(self, statistics: QuantState, move: Any) -> QuantState:
        return map_quant_state(statistics, move)

    def _adopt(self, weight: torch.Tensor) -> None:
        if isinstance(weight, Params4bit):
            self.quant_state = weight.quant_state if weight.bnb_quantized else None

    # --------------------------------------------------------------------------------------------------------------- checkpoints

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self._statistics(self.weight)
        if state is not None:
            for name, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = value if keep_vars else value.detach()

    def _load_weight(self, entries: Dict[str, Any], assign: bool, missing: List[str], errors: List[str]) -> Set[str]:
        source = entries["weight"].data
        saved = {name: value for name, value in entries.items() if name.startswith("weight.")}
        shape = (self.out_features, self.in_features)
        if not saved and tuple(source.shape) == shape:
            return self._load_values(source, assign)
        if not saved and source.numel() * source.element_size() != (shape[0] * shape[1] + 1) // 2:
            return set()
        handled = {"weight", *saved}
        missing.extend(self._missing(saved))
        if missing:
            return handled
        if not assign:
            source = source.clone()
            saved = {name: value.clone() for name, value in saved.items()}
        device = source.device if assign or self.weight.is_meta else self.weight.device
        new = Params4bit.from_prequantized(source, saved, device=device)
        assert new.quant_state is not None
        if tuple(new.quant_state.shape) != shape:
            found = list(new.quant_state.shape)
            errors.append(f"size mismatch: the checkpoint's weight is of shape {found}, the module's of shape {list(shape)}.")
            return handled
        new.module = self
        self._replace_weight(new, assign)
        return handled

    def _load_values(self, source: torch.Tensor, assign: bool) -> Set[str]:
        """Load floating-point values."""
        weight, quantized = self.weight, self._statistics(self.weight) is not None
        if not isinstance(weight, Params4bit) or not (assign or quantized):
            return set()
        new = weight._like(source if assign else source.clone(), module=self, quant_state=None, bnb_quantized=False)
        self._replace_weight(new.to(weight.device) if quantized else new, assign)
        return {"weight"}

    def _missing(self, saved: Dict[str, Any]) -> List[str]:
        """Name the statistics that a checkpoint lacks."""
        names = ["absmax", "quant_map"]
        absmax = saved.get("weight.absmax")
        if any(name.startswith("weight.nested_") for name in saved) or (absmax is not None and absmax.dtype == torch.uint8):
            names += ["nested_absmax", "nested_quant_map"]
        missing = [f"weight.{name}" for name in names if f"weight.{name}" not in saved]
        if not any(name.startswith(_PACKED) for name in saved):
            described = self.quant_state if self.quant_state is not None else self.weight
            missing.append(_PACKED + described.quant_type)
        return missing


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
