"""`WeightFormat`: one way to hold the weights of linear layers, as an argument, as layers, and as a checkpoint's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterable, Mapping, Optional, Union

import torch
from torch import nn

from bnb_core.errors import CheckpointError, InvalidArgumentError
from bnb_core.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bnb_core.ops.checks import FLOAT_DTYPES
from bnb_core.quantization.checkpoint import dtype_name
from bnb_core.quantization.codebooks import get_4bit_type

#: Features whose magnitude reaches this stay in floating point; the value of the LLM.int8() paper (arXiv 2208.07339).
INT8_THRESHOLD = 6.0
_DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}


@dataclass(frozen=True)
class WeightFormat:
    """How weights are quantized: by `int8_threshold` if that is not None, in 4 bits otherwise."""

    quant_type: str
    double_quant: bool = False
    compute_dtype: Optional[torch.dtype] = None
    int8_threshold: Optional[float] = None

    @classmethod
    def parse(
        cls,
        to: str,
        double_quant: Optional[bool] = None,
        compute_dtype: Optional[torch.dtype] = None,
        threshold: Optional[float] = None,
    ) -> "WeightFormat":
        """Check the arguments that users give, and fill in defaults.

        Args:
            to: "int8", or the name of a 4-bit codebook such as "nf4".
            double_quant: quantize the block scales too; True if None. Only for 4-bit formats.
            compute_dtype: dtype to multiply in; that of each input if None. Only for 4-bit formats.
            threshold: input columns with any |x| >= threshold are multiplied in floating point; 6.0 if None. Only for "int8".

        Raises:
            InvalidArgumentError: an unknown format, or an argument that is not for it.
        """
        if to == "int8":
            for name, value in (("double_quant", double_quant), ("compute_dtype", compute_dtype)):
                if value is not None:
                    raise InvalidArgumentError(f"{name} is {value}, but int8 weights have no such thing; leave it out")
            threshold = INT8_THRESHOLD if threshold is None else float(threshold)
            if not threshold >= 0:
                raise InvalidArgumentError(f"threshold is {threshold}; it must be 0.0 (no outliers) or positive")
            return cls("int8", int8_threshold=threshold)
        if threshold is not None:
            raise InvalidArgumentError(f"threshold is {threshold}, but it is for int8 weights, not for {to!r}; leave it out")
        if compute_dtype is not None and compute_dtype not in FLOAT_DTYPES:
            raise InvalidArgumentError(f"compute_dtype is {compute_dtype}; it must be one of {', '.join(map(str, FLOAT_DTYPES))}")
        try:
            get_4bit_type(to, "cpu")
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f'the format is {to!r}; it must be "int8" or a 4-bit type: {error}') from error
        return cls(to, True if double_quant is None else double_quant, compute_dtype)

    @property
    def is_int8(self) -> bool:
        """Whether weights are int8 rows, not 4-bit blocks."""
        return self.int8_threshold is not None

    def layer(self, in_features: int, out_features: int) -> Union[Linear4bit, Linear8bitLt]:
        """Make a layer on the meta device, without a bias."""
        if self.int8_threshold is not None:
            return Linear8bitLt(
                in_features, out_features, bias=False, has_fp16_weights=False, threshold=self.int8_threshold, device="meta"
            )
        return Linear4bit(
            in_features,
            out_features,
            bias=False,
            compute_dtype=self.compute_dtype,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
            device="meta",
        )

    def quantized_layer(self, weight: torch.Tensor, device: Union[torch.device, str]) -> nn.Module:
        """Make a layer of a floating-point weight [N, K], quantized on that device; without a bias."""
        layer = self.layer(weight.shape[1], weight.shape[0])
        if isinstance(layer, Linear8bitLt):
            layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            layer.weight = Params4bit(weight, compress_statistics=self.double_quant, quant_type=self.quant_type, module=layer)
        return layer.to(device)

    @classmethod
    def of(cls, layer: Union[Linear4bit, Linear8bitLt]) -> "WeightFormat":
        """Return the format of a layer."""
        if isinstance(layer, Linear8bitLt):
            return cls("int8", int8_threshold=layer.state.threshold)
        state = layer.quant_state
        if state is None:
            raise layer._not_quantized()
        return cls(state.quant_type or "", state.nested, layer.compute_dtype)

    def to_config(self, skipped: Iterable[str], default_dtype: torch.dtype) -> Dict[str, Any]:
        """Return what transformers keeps in config.json as "quantization_config".

        Args:
            skipped: names of modules that are not quantized, or would not be, were they in the checkpoint.
            default_dtype: to multiply in, where the format leaves that to the input: transformers needs a dtype.
        """
        int8 = self.is_int8
        return {
            "_load_in_4bit": not int8,
            "_load_in_8bit": int8,
            "bnb_4bit_compute_dtype": "float32" if int8 else dtype_name(self.compute_dtype or default_dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4" if int8 else self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": sorted(skipped),
            "llm_int8_threshold": self.int8_threshold if self.int8_threshold is not None else INT8_THRESHOLD,
            "load_in_4bit": not int8,
            "load_in_8bit": int8,
            "quant_method": "bitsandbytes",
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "WeightFormat":
        """Read what `to_config` or transformers wrote.

        Raises:
            CheckpointError: it is for another quantization method, or has values that are not accepted.
        """
        if config.get("quant_method", "bitsandbytes") != "bitsandbytes":
            raise CheckpointError(f"quantization_config: quant_method is {config['quant_method']!r}; it must be 'bitsandbytes'")
        try:
            if config.get("load_in_8bit"):
                return cls.parse("int8", threshold=config.get("llm_int8_threshold"))
            compute_dtype = config.get("bnb_4bit_compute_dtype", "float32")
            if compute_dtype not in _DTYPES:
                raise InvalidArgumentError(f"bnb_4bit_compute_dtype is {compute_dtype!r}; it must be one of {', '.join(_DTYPES)}")
            return cls.parse(
                config.get("bnb_4bit_quant_type", "fp4"), bool(config.get("bnb_4bit_use_double_quant")), _DTYPES[compute_dtype]
            )
        except (InvalidArgumentError, TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config: {error}") from error
