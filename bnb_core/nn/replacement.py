"""Replace the linear layers of a model by others of the same sizes."""

from __future__ import annotations

from typing import Callable, Optional, Sequence

import torch


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
        post_processing_function: name of a method of layers that are replaced; each that has it is passed to it afterwards.
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
            getattr(child, post_processing_function, lambda _: None)(child)
    return model
