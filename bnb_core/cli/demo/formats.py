"""The weight formats that the demo compares, and a model put into each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, List, NamedTuple, Tuple

import torch
from torch import nn

import bnb_core as bnb
from bnb_core.cli.demo.memory import storage_bytes
from bnb_core.errors import InvalidArgumentError

#: Features whose magnitude reaches this stay in floating point; the value of the LLM.int8() paper (arXiv 2208.07339).
INT8_THRESHOLD = 6.0


class Format(NamedTuple):
    """One way to hold the weights of linear layers."""

    key: str
    label: str
    quantize: Callable[[nn.Linear], nn.Module]
    """Makes the layer that takes a linear layer's place, all but its bias."""


@dataclass(frozen=True)
class FormatResult:
    """What a model weighs in one format."""

    format: str
    label: str
    parameters: int
    """Numbers in the model, quantized or not."""
    linear_layers: int
    """Layers that are quantized, or would be."""
    weight_bytes: int
    """All that the model would save: weights, scales and codebooks."""
    linear_bytes: int
    """The same for those linear layers alone."""


def _int8(linear: nn.Linear) -> nn.Module:
    quantized = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, has_fp16_weights=False, threshold=INT8_THRESHOLD, device="meta"
    )
    quantized.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return quantized


def _four_bit(quant_type: str, nested: bool) -> Callable[[nn.Linear], nn.Module]:
    def quantize(linear: nn.Linear) -> nn.Module:
        quantized = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, compress_statistics=nested, quant_type=quant_type, device="meta"
        )
        quantized.weight = bnb.nn.Params4bit(linear.weight.data, compress_statistics=nested, quant_type=quant_type)
        return quantized

    return quantize


QUANTIZED = (
    Format("int8", "LLM.int8()", _int8),
    Format("nf4", "NF4", _four_bit("nf4", nested=False)),
    Format("nf4-nested", "NF4 + double quant.", _four_bit("nf4", nested=True)),
    Format("fp4", "FP4", _four_bit("fp4", nested=False)),
)


def in_each_format(load: Callable[[], nn.Module], device: torch.device) -> Iterator[Tuple[nn.Module, FormatResult]]:
    """Yield the model as it is loaded, then in each format of `QUANTIZED`.

    Args:
        load: returns the model on the CPU, as new each time, so that no two have to be in memory. The layer that its
            `get_output_embeddings`, if it has one, returns is left alone, as is usual: nothing after it absorbs its errors.
        device: where the models are yielded.

    Raises:
        InvalidArgumentError: the model has no layer to quantize.
    """
    for form in (None, *QUANTIZED):
        model = load()
        output = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output]
        if not names:
            raise InvalidArgumentError(
                f"{type(model).__name__} has no nn.Linear besides its output layer: there is nothing to quantize"
            )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if form is None:
            key = label = _dtype_name(model)
        else:
            key, label = form.key, form.label
            _quantize(model, names, form, device)
        model.to(device)
        weights = model.state_dict()
        linears = [value for name, value in weights.items() if name.startswith(tuple(f"{layer}." for layer in names))]
        yield model, FormatResult(key, label, parameters, len(names), storage_bytes(weights.values()), storage_bytes(linears))
        del model, output, weights, linears


def _dtype_name(model: nn.Module) -> str:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def _quantize(model: nn.Module, names: List[str], form: Format, device: torch.device) -> None:
    """Quantize the layers of these names one after the other, so that the model only ever shrinks."""
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        quantized = form.quantize(linear)
        quantized.bias = linear.bias
        replace_layer(model, name, quantized.to(device))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
