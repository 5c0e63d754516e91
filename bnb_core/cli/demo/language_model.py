"""Compare a language model's perplexity, and the text it writes, between weight formats."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Protocol

import torch
from torch import nn

from bnb_core.cli.demo.formats import FormatResult, in_each_format

BATCH = 32


@dataclass(frozen=True)
class LanguageResult(FormatResult):
    """What became of a language model in one format."""

    perplexity: float
    """Of held-out text: exp of the mean negative log-likelihood of a token."""
    sample: str
    """Text that the model wrote."""


class LanguageModel(Protocol):
    """A language model that can be loaded again and again."""

    name: str
    unit: str
    """What it predicts: a character or a token."""
    device: torch.device

    def load(self) -> nn.Module:
        """Return the model on the CPU, as new."""

    def held_out(self) -> torch.Tensor:
        """Return windows of text to measure on, i64[windows, length]."""

    def loss(self, model: Any, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood of the windows' tokens but the first, in nats."""

    def generate(self, model: Any) -> str:
        """Return some text of the model's."""


def compare_perplexity(source: LanguageModel, limit: int) -> Iterator[LanguageResult]:
    """Measure the model in every format, and yield one result for each; the original comes first.

    Args:
        source: the language model, such as `TrainedGPT`.
        limit: most windows of held-out text to measure on.
    """
    windows = source.held_out()[:limit].to(source.device)
    for model, facts in in_each_format(source.load, source.device):
        perplexity = measure_perplexity(functools.partial(source.loss, model), windows)
        with torch.no_grad():
            sample = source.generate(model)
        yield LanguageResult(**vars(facts), perplexity=perplexity, sample=sample)


@torch.no_grad()
def measure_perplexity(loss: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor) -> float:
    """Return exp of the mean of `loss` over windows of equal length."""
    total = sum(loss(batch).item() * len(batch) for batch in windows.split(BATCH))
    return math.exp(total / len(windows))
