"""Quantize the linear layers of any model in place, and turn them back: `quantize_model`, `dequantize_model`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn

from bnb_core.errors import InvalidArgumentError, NotQuantizedError
from bnb_core.integrations.report import QuantizationReport, QuantizedLayer
from bnb_core.integrations.weight_format import WeightFormat
from bnb_core.nn import Linear4bit, Linear8bitLt
from bnb_core.nn.parameters import plain_data
from bnb_core.ops import int8_dequantize_rows
from bnb_core.ops.checks import FLOAT_DTYPES
from bnb_core.quantization.four_bit import dequantize_4bit

#: Modules that compute with the weights of the layers in them, without calling these.
_READ_THEIR_LAYERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
#: Where modules keep hooks on their calls; some are newer than others.
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)
#: Output layers, by the name that language models have for them. Nothing after them absorbs their errors.
OUTPUT_LAYERS = ("lm_head",)


def quantize_model(
    model: nn.Module,
    to: str = "nf4",
    *,
    skip: Sequence[str] = OUTPUT_LAYERS,
    double_quant: Optional[bool] = None,
    compute_dtype: Optional[torch.dtype] = None,
    threshold: Optional[float] = None,
    device: Union[torch.device, str, None] = None,
) -> QuantizationReport:
    """Quantize the linear layers of a model in place, one after the other, so that the model only ever shrinks.

    Left alone are: layers that `skip` names; the layer that the model's `get_output_embeddings` returns; weights shared with other
    modules, or computed from others; subclasses of `nn.Linear`, whose forward may be another; and layers whose weight another
    module reads itself, such as those in `nn.MultiheadAttention`. Hooks stay. GPT-2's `Conv1D`, a linear layer with a transposed
    weight, is quantized too.

    Args:
        model: with its weights, on any device. A model that is itself a linear layer cannot be replaced in place.
        to: "nf4", "fp4" (QLoRA, arXiv 2305.14314), another codebook of 16 values, or "int8" (LLM.int8, arXiv 2208.07339).
        skip: names of layers to leave alone. A name matches whole dotted components anywhere, and what lies below: "lm_head",
            "layers.0", "layers.*.mlp".
        double_quant: quantize the block scales too; True if None. Only for 4-bit formats.
        compute_dtype: float32, float16 or bfloat16, to multiply in; by default that of each input. Only for 4-bit formats.
        threshold: input columns with any |x| >= threshold are multiplied in floating point; 6.0 if None. Only for "int8".
        device: move each layer there to quantize it, and the rest of the model at the end; by default everything stays where it is.

    Returns:
        What was done.

    Raises:
        InvalidArgumentError: a format or argument that is not accepted, weights on the meta device, or nothing to quantize.
    """
    form = WeightFormat.parse(to, double_quant, compute_dtype, threshold)
    places, skipped = layers_to_quantize(model, skip)
    report = QuantizationReport(to, skipped=skipped, bytes_before=_saved_bytes(model))
    for names in places:
        old: Any = model.get_submodule(names[0])
        new = _quantized(old, form, device)
        for name in names:
            replace_module(model, name, new)
        old_bytes = plain_data(old.weight).numel() * plain_data(old.weight).element_size()
        report.layers.append(QuantizedLayer(names[0], old_bytes, _saved_bytes(new) - _bias_bytes(new)))
        del old
    if device is not None:
        model.to(device)
    report.bytes_after = report.bytes_before - sum(layer.bytes_before - layer.bytes_after for layer in report.layers)
    return report


def dequantize_model(model: nn.Module, dtype: Optional[torch.dtype] = None) -> List[str]:
    """Replace the quantized linear layers of a model by `nn.Linear`, in place.

    Args:
        model: any model with `Linear4bit` or `Linear8bitLt` layers, on any device.
        dtype: of the new weights and biases; by default, what a 4-bit weight was quantized from. int8 weights do not know that:
            they become what their bias is, or the model's first floating-point parameter.

    Returns:
        The names of the layers that were replaced.

    Raises:
        NotQuantizedError: a layer's weight has not been quantized yet.
    """
    replaced = []
    common = next((parameter.dtype for parameter in model.parameters() if parameter.dtype in FLOAT_DTYPES), torch.float32)
    for names in names_of(model, lambda module: isinstance(module, (Linear4bit, Linear8bitLt))):
        old = model.get_submodule(names[0])
        weight = _dequantized(names[0], old, common)
        new: Any = _in_place_of(old, nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
        new.weight = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
        if new.bias is not None:
            new.bias.data = new.bias.data.to(new.weight.dtype)
        for name in names:
            replace_module(model, name, new)
        replaced.append(names[0])
    return replaced


def matches(name: str, patterns: Sequence[str]) -> Optional[str]:
    """Return the first pattern that matches whole dotted components of the name, or None."""
    return next((pattern for pattern in patterns if fnmatchcase(f".{name}.", f"*.{pattern}.*")), None)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_transposed_linear(module: nn.Module) -> bool:
    """Say whether it is transformers' `Conv1D`, which GPT-2 is made of: a linear layer whose weight is [K, N]."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def names_of(model: nn.Module, wanted: Any) -> List[List[str]]:
    """Return the names of the modules that are wanted, those of one module together; not the model itself."""
    names: Dict[int, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if wanted(module) and name:
            names.setdefault(id(module), []).append(name)
    return list(names.values())


def layers_to_quantize(model: nn.Module, skip: Sequence[str] = OUTPUT_LAYERS) -> Tuple[List[List[str]], Dict[str, str]]:
    """Choose what `quantize_model` replaces.

    Returns:
        The names of each layer, which may be in several places, and by name of each that is left alone, why.

    Raises:
        InvalidArgumentError: there is none, one is on the meta device, or `skip` is a string.
    """
    if isinstance(skip, str):
        raise InvalidArgumentError(f"quantize_model: skip is the string {skip!r}; pass a sequence of names, such as ({skip!r},)")
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    owners: Dict[int, List[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    places, skipped = [], {}
    for names in names_of(model, lambda module: isinstance(module, nn.Linear) or is_transposed_linear(module)):
        module = model.get_submodule(names[0])
        reason = _why_not(model, names, module, skip)
        if reason is None and module is output:
            reason = "it is the output layer"
        if reason is None:
            others = [name for name in owners[id(module.weight)] if name not in names]
            reason = f"its weight is shared with {others[0]}" if others else None
        if reason is not None:
            skipped[names[0]] = reason
        elif module.weight.is_meta:
            raise InvalidArgumentError(f"quantize_model: {names[0]} is on the meta device; load the model's weights first")
        else:
            places.append(names)
    if not places:
        reasons = "".join(f"; {name}: {reason}" for name, reason in skipped.items())
        if isinstance(model, nn.Linear):
            reasons = " in it, but is one itself, which cannot be replaced in place; put it into an nn.Sequential"
        raise InvalidArgumentError(f"quantize_model: {type(model).__name__} has no linear layer to quantize{reasons}")
    return places, skipped


def _why_not(model: nn.Module, names: List[str], module: nn.Module, skip: Sequence[str]) -> Optional[str]:
    for name in names:
        pattern = matches(name, skip)
        if pattern is not None:
            return f"skip has {pattern!r}"
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, _READ_THEIR_LAYERS):
            return f"{type(parent).__name__} reads its weight itself"
    if isinstance(module, (Linear4bit, Linear8bitLt)):
        return "it is quantized already"
    if type(module) is not nn.Linear and not is_transposed_linear(module):
        return f"it is a {type(module).__name__}, not an nn.Linear itself"
    if "weight" not in module._parameters:  # but the result of pruning, for instance
        return "its weight is no parameter of its own"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {module.weight.dtype}"
    return None


def _quantized(old: Any, form: WeightFormat, device: Union[torch.device, str, None]) -> nn.Module:
    weight = old.weight.data
    if is_transposed_linear(old):
        weight = weight.T.contiguous()
    new = _in_place_of(old, form.quantized_layer(weight, device or weight.device))
    return new if device is None else new.to(device)


def _in_place_of(old: Any, new: nn.Module) -> nn.Module:
    """Give a module what else is known of the one whose place it takes."""
    new.bias = old.bias
    for name in _HOOKS:
        if name in vars(old):
            setattr(new, name, vars(old)[name])
    return new.train(old.training)


def _dequantized(name: str, layer: Any, common: torch.dtype) -> torch.Tensor:
    statistics = layer._statistics(layer.weight)
    if statistics is None:
        raise NotQuantizedError(f"dequantize_model: the weight of {name} is not quantized; move the model to a device first")
    if isinstance(layer, Linear8bitLt):
        return int8_dequantize_rows(plain_data(layer.weight), statistics, common if layer.bias is None else layer.bias.dtype)
    return dequantize_4bit(plain_data(layer.weight), statistics)


def _saved_bytes(module: nn.Module) -> int:
    tensors = [value for value in module.state_dict().values() if isinstance(value, torch.Tensor)]
    return sum({(value.data_ptr(), value.numel()): value.numel() * value.element_size() for value in tensors}.values())


def _bias_bytes(layer: Any) -> int:
    return 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
