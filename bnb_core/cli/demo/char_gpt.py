"""A small character-level GPT: pre-norm transformer blocks with rotary positions (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from bnb_core.cli.demo.attention import attend, split_heads

#: Slowest rotation, in characters for each radian: about the length of a passage that the model sees.
_ROTARY_BASE = 1000.0


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.joined = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        projected = self.query_key_value(self.attention_norm(x)).chunk(3, -1)
        query, key, value = (split_heads(part, self.heads) for part in projected)
        x = x + self.joined(attend(_rotate(query, rotation), _rotate(key, rotation), value, mask))
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class CharGPT(nn.Module):
    """A causal language model over character codes.

    Args:
        characters: size of the alphabet.
        width: size of the residual stream. A multiple of `heads`, by an even number.
        layers, heads: blocks, and attention heads in each.
        context: most characters that it can see at once.
    """

    def __init__(self, characters: int, width: int = 128, layers: int = 3, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, characters, bias=False)
        self.apply(_initialize)
        for name, parameter in self.named_parameters():
            if name.endswith(("joined.weight", "down.weight")):  # two additions a block: keep the sum of all near unit size
                parameter.data /= (2 * layers) ** 0.5
        self.rotation: torch.Tensor
        self.mask: torch.Tensor
        self.register_buffer("rotation", _rotations(context, width // heads), persistent=False)
        self.register_buffer("mask", torch.full((context, context), -torch.inf).triu(1), persistent=False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the logits of each next character, T[batch, length, characters], for i64[batch, length <= context]."""
        length = codes.shape[1]
        x = self.characters(codes)
        for block in self.blocks:
            x = block(x, self.rotation[:, :length], self.mask[:length, :length])
        return self.lm_head(self.norm(x))

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood of a character, in nats.

        Args:
            windows: i64[batch, length <= context + 1], of which all characters but the first are predicted.
        """
        return functional.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer, under the name that transformers gives it."""
        return self.lm_head


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)


def _rotations(length: int, width: int) -> torch.Tensor:
    """Return cosines and sines, f32[2, length, width]."""
    frequencies = _ROTARY_BASE ** (-torch.arange(0, width, 2) / width)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + half]) of the last dimension by the angle of its position."""
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat((-second, first), -1) * rotation[1]
