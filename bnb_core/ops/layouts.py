"""Whether many tensors still have the types, dtypes, devices, shapes and strides that they had."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Sequence

import torch

from bnb_core.ops.plain import ordinary_execution


def _find_guards() -> Optional[Callable[[Sequence[torch.Tensor]], Any]]:
    """Return what makes torch.compile's own check of inputs, from torch 2.1 on: a tenth of the time of one in Python."""
    try:
        guards: Any = torch._C._dynamo.guards.TensorGuards
        guards(torch.empty(0), dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, TypeError):
        return None
    return lambda tensors: guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


_guards_of = _find_guards()


class Layouts:
    """What some tensors were like, to compare others with, or the same ones later.

    Args:
        tensors: one or more.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._known = [_layout(tensor) for tensor in tensors]
        self._guards: Any = None

    def hold_for(self, tensors: List[torch.Tensor]) -> bool:
        """Say whether these tensors, as many as there were, are like those in their order."""
        if _guards_of is None or not ordinary_execution():  # compilers look into no guards of others
            return self._compare(tensors)
        if self._guards is not None and self._guards.check(*tensors):
            return True
        # The guards depend on more than layouts, such as on autocast and on whether gradients are asked for.
        same = self._compare(tensors)
        if same:
            self._guards = _guards_of(tensors)
        return same

    def _compare(self, tensors: List[torch.Tensor]) -> bool:
        for tensor, (cls, layout, strides, numel, dtype, device) in zip(tensors, self._known):
            if (
                type(tensor) is not cls
                or tensor.layout is not layout
                or tensor.dtype is not dtype
                or tensor.numel() != numel
                or tensor.stride() != strides
                or tensor.device != device
            ):
                return False
        return True


def _layout(tensor: torch.Tensor) -> Any:
    return type(tensor), tensor.layout, tensor.stride(), tensor.numel(), tensor.dtype, tensor.device
