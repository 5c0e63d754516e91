"""`bnb doctor`: show what `bnb_core.backends.doctor` finds, as text or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import List, Optional

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnb_core.backends.doctor import Report, Runner, examine
from bnb_core.cli import output
from bnb_core.ops.spec import OPS

EVERYTHING = "*"
_STYLES = {"ok": "green", "ready": "green", "hint": "cyan", "warn": "yellow", "fail": "red", "broken": "red", "incompatible": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--device", default="cpu", show_default=True, help="Torch device whose ops are listed, such as cuda.")
@click.option("--self-test", is_flag=True, help="Also run a small op with a known answer on each backend that is ready.")
@click.option(
    "-v",
    "--verbose",
    is_flag=False,
    flag_value=EVERYTHING,
    metavar="[NAME]",
    help="Show the tracebacks of everything that failed, or of backend NAME.",
)
def doctor(as_json: bool, device: str, self_test: bool, verbose: Optional[str]) -> None:
    """Show backends, who runs which op, and what is wrong.

    The exit code is 1 when the selected backend is not ready.
    """
    report = examine(device, self_test=self_test)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _print(report, verbose)
    sys.exit(0 if report.ready else 1)


def _print(report: Report, verbose: Optional[str]) -> None:
    console = output.console()
    console.print("   ".join(f"{name} {version}" for name, version in report.versions.items()))
    selected = ", ".join(report.selected) or "none"
    console.print(f"selection   {selected}   ({report.selected_by or 'unknown'})   fallback: {report.fallback or 'unknown'}")
    for table in (_backends(report), _ops(report), _checks(report)):
        if table.row_count:
            console.print()
            console.print(table)
    _print_tracebacks(console, report, verbose)


def _styled(word: str) -> Text:
    return Text(word, style=_STYLES.get(word, ""))


def _backends(report: Report) -> Table:
    table = output.table("backend", "state", "distribution", "priority", "ops", "notes")
    for row in report.backends:
        priority = "-" if row.priority is None else str(row.priority)
        ops = "-" if row.ops is None else f"{row.ops}/{len(OPS)}"
        table.add_row(Text(row.name), _styled(row.state), Text(row.distribution), priority, ops, Text(row.notes))
    return table


def _ops(report: Report) -> Table:
    dtypes: List[str] = []
    for runners in report.ops.values():
        dtypes.extend(dtype for dtype in runners if dtype not in dtypes)
    table = output.table(f"op on {report.device}", *dtypes)
    for op, runners in report.ops.items():
        table.add_row(op, *(Text(_cell(runners.get(dtype))) for dtype in dtypes))
    if any(runner.conditional for runners in report.ops.values() for runner in runners.values()):
        table.caption = Text("* calls that it refuses run on the next backend")
    return table


def _cell(runner: Optional[Runner]) -> str:
    if runner is None:  # the op has no such dtype
        return ""
    return (runner.backend or "nobody") + ("*" if runner.conditional else "")


def _checks(report: Report) -> Table:
    table = output.table("checks", "")
    for check in report.checks:
        table.add_row(_styled(check.level), Text(check.message))
    return table


def _print_tracebacks(console: Console, report: Report, verbose: Optional[str]) -> None:
    if verbose is None:
        return
    if verbose not in (EVERYTHING, *report.tracebacks):
        console.print(f"\nno traceback of {verbose!r}; there are tracebacks of: {', '.join(report.tracebacks) or 'nothing'}")
    for what, text in report.tracebacks.items():
        if verbose in (EVERYTHING, what):
            console.print(f"\ntraceback of {what}:\n{text}", end="")
