"""Run the demo: measure, show and write down one section after the other."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import click
import torch
from rich.console import Console
from rich.markup import escape

import bnb_core as bnb
from bnb_core.backends import BackendFallbackWarning, fallbacks
from bnb_core.cli.demo import plots, preflight, report
from bnb_core.cli.demo.checkpoint import LanguageCheckpoint, open_checkpoint
from bnb_core.cli.demo.document import Block, Heading, Paragraph
from bnb_core.cli.demo.encoder import SentenceEncoder, compare_embeddings
from bnb_core.cli.demo.formats import QUANTIZED
from bnb_core.cli.demo.language_model import LanguageModel, compare_perplexity
from bnb_core.cli.demo.minilm import MiniLM
from bnb_core.cli.demo.terminal import collect, show
from bnb_core.cli.demo.training import TrainedGPT, Training
from bnb_core.errors import BnbError


class Effort(NamedTuple):
    """How much is trained and measured."""

    steps: int
    repetitions: int
    """Times that a batch is timed."""
    windows: int
    """Windows of held-out text to measure perplexity on."""


FULL = Effort(steps=600, repetitions=5, windows=512)
QUICK = Effort(steps=60, repetitions=1, windows=8)


def run(output: Path, model: Optional[Path], steps: Optional[int], seed: int, device: Optional[str], quick: bool) -> None:
    """Run the demo; the arguments are the options of `bnb demo`.

    Raises:
        click.ClickException: something that the user can change stands in the way.
    """
    effort = QUICK if quick else FULL
    preflight.check_packages(built_in=model is None)
    preflight.prepare_folder(output)
    try:
        tour = Tour(output, preflight.choose_device(device), seed, effort._replace(steps=steps or effort.steps))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BackendFallbackWarning)  # the report lists them
            if model is None:
                tour.built_in()
            else:
                tour.checkpoint(model)
        tour.finish()
    except BnbError as error:
        raise click.ClickException(str(error)) from error


class Tour:
    """The sections of the demo, and what they have shown so far."""

    def __init__(self, output: Path, device: torch.device, seed: int, effort: Effort) -> None:
        self.output = output
        self.device = device
        self.seed = seed
        self.effort = effort
        self.console = Console(highlight=False)
        self.blocks: List[Block] = []
        self.started = time.perf_counter()
        environment = preflight.describe(device, seed)
        self.results: Dict[str, Any] = {"environment": environment}
        self._add(report.opening_blocks(environment))

    def built_in(self) -> None:
        """Show the encoder of the registry, then a model trained here."""
        self._encoder(MiniLM.installed(self.device))
        with _one_thread():
            trained = self._training()
            self._add([Heading("The same language model, quantized")])
            self._language_model(trained)

    def checkpoint(self, folder: Path) -> None:
        """Show a local checkpoint."""
        source = open_checkpoint(folder, self.device)
        if isinstance(source, LanguageCheckpoint):
            self._add([Heading(f"Language model {source.name}")])
            self._language_model(source)
        else:
            self._encoder(source)

    def finish(self) -> None:
        """Write the report, and say where."""
        events = [f"{event} ({count} times)" for event, count in fallbacks().items()]
        if events:
            self._add([Heading("Fallbacks"), *map(Paragraph, events)])
        self.results["fallbacks"] = events
        self.results["seconds"] = time.perf_counter() - self.started
        files = report.write(self.output, self.blocks, self.results)
        names = ", ".join(path.name for path in files)
        self.console.print(f"\n[bold green]Done[/] in {self.results['seconds']:.0f} s. {names} are in")
        self.console.print(escape(str(self.output.resolve())), style="bold", soft_wrap=True)

    def _encoder(self, source: SentenceEncoder) -> None:
        self._add([Heading(f"Sentence encoder {source.name}")])
        compared = compare_embeddings(source, self.effort.repetitions)
        results = collect(self.console, source.name, compared, len(QUANTIZED) + 1, lambda result: result.label)
        figure = self.output / "encoder.png"
        plots.draw_encoder(results, figure)
        self.results["encoder"] = {"model": source.name, "formats": [asdict(result) for result in results]}
        self._add(report.encoder_blocks(results, figure))

    def _training(self) -> TrainedGPT:
        self._add([Heading("Language model, trained twice")])
        results = []
        for name in ("AdamW", "AdamW8bit"):
            training = Training(name, getattr(bnb.optim, name), self.effort.steps, self.seed, self.device)
            collect(self.console, name, training.run(), self.effort.steps, lambda loss: f"loss {loss:.2f}")
            results.append(training.result(self.effort.windows))
        figure = self.output / "training.png"
        plots.draw_training(results, figure)
        self.results["training"] = [asdict(result) for result in results]
        self._add(report.training_blocks(results, figure))
        return TrainedGPT(training.model, self.seed, self.device)

    def _language_model(self, source: LanguageModel) -> None:
        compared = compare_perplexity(source, self.effort.windows)
        results = collect(self.console, source.name, compared, len(QUANTIZED) + 1, lambda result: result.label)
        figure = self.output / "language_model.png"
        plots.draw_language_model(results, source.unit, figure)
        self.results["language_model"] = {"model": source.name, "formats": [asdict(result) for result in results]}
        self._add(report.language_blocks(source.unit, results, figure))

    def _add(self, blocks: List[Block]) -> None:
        show(self.console, blocks)
        self.blocks += blocks


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run what is too small to be shared out: more threads gain little there, and cost much when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
