"""Train the character-level GPT on Python's language reference with one optimizer or another."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Callable, Iterator, List

import torch
from torch import nn

from bnb_core.cli.demo.char_gpt import CharGPT
from bnb_core.cli.demo.language_model import measure_perplexity
from bnb_core.cli.demo.memory import storage_bytes
from bnb_core.cli.demo.text import ALPHABET, language_reference

BATCH = 8
LEARNING_RATE = 3e-3
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
#: Parts of all the steps: the learning rate rises during the first, and falls during the last.
WARMUP, DECAY = 0.05, 0.5
MAX_GRADIENT_NORM = 1.0
#: Steps whose mean is called the final loss.
FINAL_STEPS = 50

_CODES = {character: code for code, character in enumerate(ALPHABET)}

PROMPT = "The "
SAMPLE_CHARACTERS = 240
TEMPERATURE = 0.7


@dataclass(frozen=True)
class TrainingResult:
    """How the training went with one optimizer."""

    optimizer: str
    losses: List[float]
    """Mean negative log-likelihood of a character of each step's batch, in nats."""
    final_loss: float
    """Mean of the last losses."""
    perplexity: float
    """Of held-out text: exp of the mean negative log-likelihood of a character."""
    state_bytes: int
    """All the tensors that the optimizer keeps besides parameters and gradients."""
    seconds: float


class Training:
    """One training: the same seed gives the same initial weights and the same batches, whatever the optimizer.

    Args:
        name: what to call it.
        make_optimizer: takes the parameters, and the keyword arguments of AdamW.
        steps: batches to train on.
        seed: of the weights and of the choice of batches.
        device: where to train.
    """

    def __init__(
        self, name: str, make_optimizer: Callable[..., torch.optim.Optimizer], steps: int, seed: int, device: torch.device
    ) -> None:
        self.name = name
        self.steps = steps
        self.device = device
        self.losses: List[float] = []
        self.seconds = 0.0
        self._batches = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = CharGPT(len(ALPHABET)).to(device)
        self.optimizer = make_optimizer(self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def run(self) -> Iterator[float]:
        """Train, and yield the loss of each step."""
        text = encode(language_reference().training)
        window = torch.arange(self.model.context + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        start = time.perf_counter()
        for _ in range(self.steps):
            first = torch.randint(len(text) - len(window) + 1, (BATCH, 1), generator=self._batches)
            loss = self.model.loss(text[first + window].to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
            self.optimizer.step()
            schedule.step()
            self.losses.append(loss.item())
            self.seconds = time.perf_counter() - start
            yield self.losses[-1]

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / (WARMUP * self.steps), (self.steps - step) / (DECAY * self.steps))

    def result(self, limit: int) -> TrainingResult:
        """Return what `run` led to, with the perplexity of at most `limit` windows of held-out text."""
        final = self.losses[-FINAL_STEPS:]
        state_bytes = storage_bytes(value for state in self.optimizer.state.values() for value in state.values())
        perplexity = measure_perplexity(self.model.loss, held_out_windows(self.model.context)[:limit].to(self.device))
        return TrainingResult(self.name, self.losses, sum(final) / len(final), perplexity, state_bytes, self.seconds)


class TrainedGPT:
    """The trained model, as a language model to compare in several formats."""

    name = "character-level GPT"
    unit = "character"

    def __init__(self, model: CharGPT, seed: int, device: torch.device) -> None:
        self.device = device
        self._model = copy.deepcopy(model).cpu().eval()
        self._seed = seed

    def load(self) -> CharGPT:
        """Return the model in float32, on the CPU."""
        return copy.deepcopy(self._model)

    def held_out(self) -> torch.Tensor:
        """Return text that the model was not trained on, i64[windows, context + 1]."""
        return held_out_windows(self._model.context)

    def loss(self, model: CharGPT, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood of a character, in nats."""
        return model.loss(windows)

    def generate(self, model: CharGPT) -> str:
        """Continue a short prompt, at random but the same for each model that agrees."""
        generator = torch.Generator().manual_seed(self._seed)
        codes = encode(PROMPT)
        for _ in range(SAMPLE_CHARACTERS):
            logits = model(codes[None, -self._model.context :].to(self.device))[0, -1].float().cpu()
            codes = torch.cat((codes, torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator)))
        return "".join(ALPHABET[code] for code in codes)


def held_out_windows(context: int) -> torch.Tensor:
    """Return text to measure on, i64[windows, context + 1]; each window starts with the last character of the one before."""
    return encode(language_reference().held_out).unfold(0, context + 1, context)


def encode(text: str) -> torch.Tensor:
    """Return the code of each character, i64[characters]."""
    return torch.tensor([_CODES[character] for character in text])
