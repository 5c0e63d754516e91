"""Compare a sentence encoder's embeddings, and what they find, between weight formats."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Protocol, Sequence

import torch
from torch import nn

from bnb_core.cli.demo.formats import FormatResult, in_each_format
from bnb_core.cli.demo.sentences import QUERIES, SENTENCES

TOP = 3
#: A batch is not timed again once its timings have taken this long.
TIMING_SECONDS = 1.0


@dataclass(frozen=True)
class EncoderResult(FormatResult):
    """What became of the encoder in one format, against the same encoder as it was loaded."""

    cosines: List[float]
    """Cosine similarity of each sentence's embedding with the original's."""
    cosine_mean: float
    cosine_min: float
    top1: float
    """Share of the queries that find the same sentence first."""
    top3: float
    """Share of the three sentences found first that stay among the three, over all queries."""
    kendall: float
    """Kendall's rank correlation with the original's ranking of the sentences, mean over the queries."""
    seconds_per_batch: float
    found: List[str]
    """The sentence that each query finds first."""


class SentenceEncoder(Protocol):
    """An encoder that can be loaded again and again."""

    name: str
    device: torch.device

    def load(self) -> nn.Module:
        """Return the model on the CPU, as new."""

    def prepare(self, sentences: Sequence[str]) -> Any:
        """Return the model's inputs for one batch of sentences, on the device."""

    def embed(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """Return one vector of length 1 a sentence."""


def compare_embeddings(source: SentenceEncoder, repetitions: int) -> Iterator[EncoderResult]:
    """Embed the demo's sentences and queries in every format, and yield one result for each; the original comes first.

    Args:
        source: the encoder, such as `MiniLM`.
        repetitions: how often the batch is timed, if that does not take too long; the fastest counts.
    """
    inputs = source.prepare(SENTENCES + QUERIES)
    original = None
    for model, facts in in_each_format(source.load, source.device):
        with torch.no_grad():
            embeddings = source.embed(model, inputs).cpu().double()
            seconds = _fastest(functools.partial(source.embed, model, inputs), repetitions)
        original = embeddings if original is None else original
        cosines = (embeddings * original).sum(1).tolist()
        similarities, before = _similarities(embeddings), _similarities(original)
        found, found_before = similarities.topk(TOP).indices, before.topk(TOP).indices
        yield EncoderResult(
            **vars(facts),
            cosines=cosines,
            cosine_mean=sum(cosines) / len(cosines),
            cosine_min=min(cosines),
            top1=_mean(found[:, 0] == found_before[:, 0]),
            top3=_mean((found[:, :, None] == found_before[:, None, :]).any(-1)),
            kendall=_mean(kendall(similarities, before)),
            seconds_per_batch=seconds,
            found=[SENTENCES[row[0]] for row in found.tolist()],
        )


def kendall(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Kendall's tau of each row of `a` with that row of `b`, both [rows, n]: 1 for the same order, -1 for the reverse."""
    order_a, order_b = ((x[:, :, None] - x[:, None, :]).sign() for x in (a, b))
    pairs = a.shape[1] * (a.shape[1] - 1)
    return (order_a * order_b).sum((1, 2)) / pairs


def _similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """Return [queries, sentences]."""
    return embeddings[len(SENTENCES) :] @ embeddings[: len(SENTENCES)].T


def _mean(values: torch.Tensor) -> float:
    return values.double().mean().item()


def _fastest(embed: Callable[[], torch.Tensor], repetitions: int) -> float:
    """Return the seconds of the fastest call."""
    timings: List[float] = []
    while not timings or (len(timings) < repetitions and sum(timings) < TIMING_SECONDS):
        start = time.perf_counter()
        embed().sum().item()  # reading a number waits for the device
        timings.append(time.perf_counter() - start)
    return min(timings)
