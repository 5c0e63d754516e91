"""Checks of indices: of rows of embedding tables, and of experts."""

from __future__ import annotations

import torch

from bnb_core.errors import InvalidArgumentError


def require_indices(op: str, indices: torch.Tensor) -> None:
    """Refuse indices that are not int32 or int64."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise InvalidArgumentError(f"{op}: indices are {indices.dtype}; cast them to torch.int64 or torch.int32")


def check_index_values(op: str, indices: torch.Tensor, rows: int) -> None:
    """Refuse indices outside [0, rows)."""
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= rows:
            raise InvalidArgumentError(f"{op}: index {low if low < 0 else high} is out of range; indices must be in [0, {rows})")
