"""The weight formats that the demo compares, and a model put into each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Optional, Tuple

import torch
from torch import nn

import bnb_core as bnb
from bnb_core.cli.demo.memory import storage_bytes
from bnb_core.integrations.model import layers_to_quantize


class Format(NamedTuple):
    """One way to hold the weights of linear layers."""

    key: str
    label: str
    to: str
    """As `quantize_model` takes it, and so is the next."""
    double_quant: Optional[bool]


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


QUANTIZED = (
    Format("int8", "LLM.int8()", "int8", None),
    Format("nf4", "NF4", "nf4", False),
    Format("nf4-nested", "NF4 + double quant.", "nf4", True),
    Format("fp4", "FP4", "fp4", False),
)


def in_each_format(load: Callable[[], nn.Module], device: torch.device) -> Iterator[Tuple[nn.Module, FormatResult]]:
    """Yield the model as it is loaded, then in each format of `QUANTIZED`.

    Args:
        load: returns the model on the CPU, as new each time, so that no two have to be in memory.
        device: where the models are yielded.

    Raises:
        InvalidArgumentError: the model has no layer to quantize.
    """
    for form in (None, *QUANTIZED):
        model = load()
        names = [name for name, *_ in layers_to_quantize(model)[0]]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if form is None:
            key = label = _dtype_name(model)
        else:
            key, label = form.key, form.label
            bnb.quantize_model(model, form.to, double_quant=form.double_quant, device=device)
        model.to(device)
        weights = model.state_dict()
        linears = [value for name, value in weights.items() if name.startswith(tuple(f"{layer}." for layer in names))]
        yield model, FormatResult(key, label, parameters, len(names), storage_bytes(weights.values()), storage_bytes(linears))
        del model, weights, linears


def _dtype_name(model: nn.Module) -> str:
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, str(dtype))
