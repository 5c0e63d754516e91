"""Count the bytes that tensors occupy."""

from __future__ import annotations

from typing import Any, Iterable

import torch


def storage_bytes(values: Iterable[Any]) -> int:
    """Return the bytes of the tensors among these values; one that occurs twice counts once."""
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
