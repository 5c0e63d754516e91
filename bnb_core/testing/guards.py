"""Tensors that lie inside larger, poisoned memory, so that what is written around them or left unwritten is seen."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import torch


class Placement(NamedTuple):
    """How tensors are placed in memory."""

    margin: int
    """Elements of poison before and after the tensor. Allocations are aligned to 64 bytes, and the margin moves the tensor on."""
    poison: int
    """The byte that fills everything which is not a tensor's own element, and outputs before they are written."""


#: Aligned, in memory of NaN; then aligned to single elements only, in memory of finite numbers.
PLACEMENTS = (Placement(64, 0xFF), Placement(67, 0x5A))


class _Guarded(NamedTuple):
    name: str
    memory: torch.Tensor
    """Every byte, of the tensor and around it."""
    tensor: torch.Tensor
    before: Optional[torch.Tensor]
    """The memory as it must stay; None if the tensor may change."""


class Arena:
    """Tensors between guards, on one device."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement = placement
        self._device = device
        self._guarded: List[_Guarded] = []

    def copy(self, name: str, tensor: torch.Tensor, mutable: bool = False) -> torch.Tensor:
        """Return a copy of a tensor, with the same strides. Unless it is `mutable`, `check` fails if it was changed."""
        memory, placed = self._place(tuple(tensor.shape), tensor.stride(), tensor.dtype)
        placed.copy_(tensor)
        self._guarded.append(_Guarded(name, memory, placed, None if mutable else memory.clone()))
        return placed

    def empty(self, name: str, shape: Tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor full of poison."""
        memory, placed = self._place(shape, torch.empty(shape, device="meta").stride(), dtype)
        self._guarded.append(_Guarded(name, memory, placed, None))
        return placed

    def check(self) -> None:
        """Fail if memory around a tensor was written, or a tensor that may not change.

        Raises:
            AssertionError: it names the tensor, and the element.
        """
        for name, memory, tensor, before in self._guarded:
            now = memory
            if before is None:
                now, before = memory.clone(), self._poisoned(memory.numel())
                for side in (now, before):
                    side.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), self._placement.margin).zero_()
            changed = (now != before).nonzero().view(-1)
            if changed.numel():
                at = int(changed[0]) // tensor.element_size() - self._placement.margin
                size = memory.numel() // tensor.element_size() - 2 * self._placement.margin
                raise AssertionError(
                    f"{name}: element {at} was written; it is an argument that may not change"
                    if 0 <= at < size and now is memory
                    else f"{name}: memory at element {at} was written, which is not of the tensor's {tensor.numel()} elements"
                )

    def _place(self, shape: Tuple[int, ...], strides: Tuple[int, ...], dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        extent = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        itemsize = torch.empty(0, dtype=dtype).element_size()
        memory = self._poisoned((extent + 2 * self._placement.margin) * itemsize)
        return memory, memory.view(dtype).as_strided(shape, strides, self._placement.margin)

    def _poisoned(self, count: int) -> torch.Tensor:
        return torch.full((count,), self._placement.poison, dtype=torch.uint8, device=self._device)
