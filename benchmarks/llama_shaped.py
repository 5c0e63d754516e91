"""A language model in Llama's shape with random weights, for benchmarks: one token at a time with a cache, or whole sequences."""

from __future__ import annotations

from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.nn import functional


class Shape(NamedTuple):
    """Sizes of a model; by default those of TinyLlama, 1.1 B parameters."""

    hidden: int = 2048
    layers: int = 22
    heads: int = 32
    key_heads: int = 4
    intermediate: int = 5632
    vocabulary: int = 32000
    positions: int = 1024

    @property
    def head(self) -> int:
        """Elements of a head."""
        return self.hidden // self.heads


class RMSNorm(nn.Module):
    """Scale to a root mean square of one (arXiv 1910.07467)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, scaled."""
        return functional.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class Attention(nn.Module):
    """Attention of grouped heads (arXiv 2305.13245) with rotated positions (arXiv 2104.09864)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        keys = shape.key_heads * shape.head
        self.query = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.key = nn.Linear(shape.hidden, keys, bias=False)
        self.value = nn.Linear(shape.hidden, keys, bias=False)
        self.output = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.cache: Optional[Tuple[torch.Tensor, torch.Tensor]] = None

    def forward(self, x: torch.Tensor, angles: torch.Tensor, position: Optional[torch.Tensor]) -> torch.Tensor:
        """Attend to all positions before; with `position`, to those in the cache, where this one is added."""
        batch, length, _ = x.shape

        def heads(projection: nn.Module) -> torch.Tensor:
            projected: torch.Tensor = projection(x)
            return projected.view(batch, length, -1, self.shape.head).transpose(1, 2)

        query, key, value = _rotated(heads(self.query), angles), _rotated(heads(self.key), angles), heads(self.value)
        mask = None
        if position is not None:
            assert self.cache is not None
            for kept, new in zip(self.cache, (key, value)):
                kept.index_copy_(2, position, new)
            key, value = self.cache
            mask = (torch.arange(self.shape.positions, device=x.device) <= position)[None]
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        result: torch.Tensor = self.output(attended.transpose(1, 2).reshape(batch, length, -1))
        return result


class Block(nn.Module):
    """Attention, and a gated product of two projections (arXiv 2002.05202)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before_attention, self.before_feed_forward = RMSNorm(shape.hidden), RMSNorm(shape.hidden)
        self.attention = Attention(shape)
        self.gate = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, position: Optional[torch.Tensor]) -> torch.Tensor:
        """Return the hidden states after this block."""
        x = x + self.attention(self.before_attention(x), angles, position)
        y = self.before_feed_forward(x)
        result: torch.Tensor = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return result


class Model(nn.Module):
    """The whole model.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, position: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return logits [batch, length, vocabulary].

        Args:
            tokens: [batch, length].
            position: of the one token, an int64 tensor [1], to go on from what is in the caches.
        """
        at = torch.arange(tokens.shape[1], device=tokens.device) if position is None else position
        rates = 10000.0 ** -(torch.arange(0, self.shape.head, 2, device=tokens.device) / self.shape.head)
        angles = at[:, None] * rates
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles, position)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits

    def make_caches(self) -> None:
        """Make empty caches for a batch of one, in the dtype of the embedding."""
        size = (1, self.shape.key_heads, self.shape.positions, self.shape.head)
        for block in self.blocks:
            like = self.embedding.weight
            block.attention.cache = (torch.zeros(size, dtype=like.dtype, device=like.device), like.new_zeros(size))

    def replace_linears(self, replacement: Callable[[nn.Linear], nn.Module]) -> None:
        """Put other layers in place of the blocks' linear ones."""
        for block in self.blocks:
            for owner, name, linear in list(_linears(block)):
                setattr(owner, name, replacement(linear))


def random_model(shape: Shape, seed: int = 0) -> Model:
    """Return a model with random weights, bfloat16, on the GPU."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = Model(shape)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.to(torch.bfloat16)


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def _linears(block: nn.Module) -> Iterator[Tuple[nn.Module, str, nn.Linear]]:
    owners: List[nn.Module] = list(block.modules())
    for owner in owners:
        for name, child in owner.named_children():
            if isinstance(child, nn.Linear):
                yield owner, name, child
