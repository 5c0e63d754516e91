"""`bnb tune`: measure which paths of a backend are the fastest on this machine, keep that, and show it."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from bnb_core.backends import tuning
from bnb_core.backends.discovery import INSTALL_HINTS, Entry, State, registry
from bnb_core.cli import output
from bnb_core.errors import BackendUnavailableError, BnbError


class _Shape(click.ParamType):
    """Rows and columns of a weight, as 4096x11008."""

    name = "NxK"

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> Tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", value)
        if found is None:
            self.fail(f"{value!r} is not rows x columns of a weight, such as 4096x11008", param, ctx)
        return int(found.group(1)), int(found.group(2))


class _Subject(NamedTuple):
    """A backend that can be tuned, and what it offers."""

    entry: Entry
    tuning: tuning.Tuning


@click.command()
@click.option("--backend", metavar="NAME", help="Tune this backend only.")
@click.option("--device", help="Torch device, such as cuda:1; by default each backend's first.")
@click.option("--shape", "shapes", type=_Shape(), multiple=True, help="Measure weights of N rows and K columns. Repeatable.")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Time that it may take."
)
@click.option("--show", is_flag=True, help="Show what was measured before, and measure nothing.")
@click.option("--clear", is_flag=True, help="Delete what was measured before: estimates choose again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def tune(
    backend: Optional[str],
    device: Optional[str],
    shapes: Tuple[Tuple[int, int], ...],
    seconds: float,
    show: bool,
    clear: bool,
    as_json: bool,
) -> None:
    """Measure which kernels are the fastest on this machine.

    Where a backend has several ways to run a call, it chooses by an estimate, or by what is measured here, from the next process
    on. The machine should be idle. Times are kept in the user's folder for caches, or in BNB_TUNE_CACHE. They hold for one
    device and version of its driver; what was measured before and is not measured again stays.
    """
    if show and clear:
        raise click.UsageError("--show and --clear exclude each other")
    try:
        subjects = _subjects(backend, device, shapes)
        if clear:
            _clear(subjects)
            return
        start = time.monotonic()
        results = []
        for subject in subjects:
            table = _read(subject) if show else _measure(subject, start + seconds - time.monotonic())
            results.append(_result(subject, table))
            if not as_json:
                _print(subject, table)
            if not show:
                tuning.write(table)
        if as_json:
            click.echo(json.dumps(results, indent=2))
        elif not show:
            click.echo(f"took {time.monotonic() - start:.1f} s")
    except BnbError as error:
        raise click.ClickException(str(error)) from error


def _subjects(backend: Optional[str], device: Optional[str], shapes: Tuple[Tuple[int, int], ...]) -> List[_Subject]:
    """Find the backends that can be tuned, or say why there is none."""
    if backend is not None:
        registry.backend(backend)  # raises where it cannot be had
    entries = [registry.entry(backend)] if backend is not None else list(registry.load_all())
    subjects = []
    for entry in entries:
        found = tuning.tuning_of(entry, device, shapes) if entry.state is State.READY else None
        if found is not None:
            subjects.append(_Subject(entry, found))
    if not subjects:
        reasons = "".join(f"\n  {entry.name}: {_why_not(entry)}" for entry in entries)
        hint = "" if backend else f"\nThe backend for NVIDIA Jetson can be tuned; {INSTALL_HINTS['jetson']}"
        raise BackendUnavailableError(f"there is no backend to tune here:{reasons or ' none is installed'}{hint}")
    return subjects


def _why_not(entry: Entry) -> str:
    return "has one way to run each call" if entry.state is State.READY else f"{entry.state}, {entry.reason}"


def _clear(subjects: List[_Subject]) -> None:
    for entry, found in subjects:
        file = tuning.clear(entry.name, found.identity.device)
        click.echo(f"deleted {file}" if file else f"{entry.name}: nothing was measured on {found.identity.device}")


def _read(subject: _Subject) -> tuning.Table:
    table = tuning.read(subject.entry.name, subject.tuning.identity)
    if table is None:
        device, folder = subject.tuning.identity.device, tuning.cache_folder()
        raise BackendUnavailableError(
            f"no times of backend {subject.entry.name!r} for {device} in {folder}; run `bnb tune` without --show"
        )
    return table


def _measure(subject: _Subject, seconds: float) -> tuning.Table:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[case]}"),
    )
    with ProgressBar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(subject.entry.name, total=len(subject.tuning.cases), case="")

        def show(progress: tuning.Progress) -> None:
            bar.update(task, completed=progress.done, case=progress.case)

        return tuning.measure(subject.entry.name, subject.tuning, seconds, show)


def _result(subject: _Subject, table: tuning.Table) -> Dict[str, Any]:
    return {
        "backend": table.backend,
        "device": table.identity.device,
        "conditions": dict(table.identity.conditions),
        "measured": table.measured,
        "file": str(table.file),
        "cases": {name: {"microseconds": times, "fastest": table.fastest(name)} for name, times in table.cases.items()},
        "missing": tuning.missing(subject.tuning, table),
    }


def _print(subject: _Subject, table: tuning.Table) -> None:
    console = output.console()
    console.print(f"{table.backend} on {table.identity.device}, {table.measured}, in microseconds")
    paths: List[str] = []
    for times in table.cases.values():
        paths.extend(path for path in times if path not in paths)
    shown = output.table("call", *paths, "chosen")
    for column in shown.columns[1:-1]:
        column.justify = "right"
    for name, times in table.cases.items():
        fastest = table.fastest(name)
        cells = (Text(f"{times[path]:.1f}" if path in times else "", "green" if path == fastest else "") for path in paths)
        shown.add_row(Text(name), *cells, fastest)
    console.print(shown)
    left = len(tuning.missing(subject.tuning, table))
    if left:
        console.print(f"{left} of {len(subject.tuning.cases)} kinds of calls have not been measured; estimates choose for these")
    console.print(f"kept in {table.file}")
