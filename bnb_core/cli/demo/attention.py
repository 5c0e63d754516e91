"""Multi-head attention, as both of the demo's models use it; torch 1.12 has none of its own to call."""

from __future__ import annotations

import torch


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Turn T[batch, length, width] into T[batch, heads, length, width / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attend with all heads, and join their results.

    Args:
        query, key, value: T[batch, heads, length, width of a head].
        mask: T, broadcast to [batch, heads, length, length]: 0 where a position may be seen, -inf where not.

    Returns:
        T[batch, length, heads * width of a head].
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
