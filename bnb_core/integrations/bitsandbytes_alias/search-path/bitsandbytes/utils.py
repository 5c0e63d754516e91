"""Helpers of bitsandbytes that clients call."""

import json
from typing import Any, Callable, Dict, Optional, Sequence

import torch

from bnb_core.nn.outlier_aware import OutlierTracer, find_outlier_dims

#: The layouts of int8 weights, by the number that a checkpoint has for each. Only "row" is in use today.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


def pack_dict_to_tensor(source_dict: Dict[str, Any]) -> torch.Tensor:
    """Return a dictionary as the bytes of its JSON, uint8 [length], which safetensors can store."""
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> Dict[str, Any]:
    """Return the dictionary of `pack_dict_to_tensor`."""
    unpacked: Dict[str, Any] = json.loads(bytes(tensor_data.tolist()))
    return unpacked


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: Callable[[int, int, bool], torch.nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: Optional[str] = None,
) -> torch.nn.Module:
    """Replace the linear layers of a model, in place, and return it.

    Args:
        model: any module.
        linear_replacement: makes a layer of in_features, out_features and whether there is a bias.
        skip_modules: names of layers, within their parent, that stay.
        copy_weights: give the new layer the old one's weight and bias.
        post_processing_function: name of a method that is called on each layer that was replaced, if it has that method.
    """
    for name, child in list(model.named_children()):
        replace_linear(child, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(child, torch.nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(child.in_features, child.out_features, child.bias is not None)
        if copy_weights:
            new.weight, new.bias = child.weight, child.bias
        setattr(model, name, new)
        if post_processing_function is not None:
            getattr(child, post_processing_function, lambda: None)()
    return model


def sync_gpu(t: torch.Tensor) -> None:
    """Wait for the work that is queued on the GPU that holds a tensor; on a CPU there is none."""
    if t.device.type in ("cuda", "xpu"):
        getattr(torch, t.device.type).synchronize(t.device)


__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "find_outlier_dims",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]
