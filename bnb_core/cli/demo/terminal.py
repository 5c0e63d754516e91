"""What the demo shows while it runs: progress bars, and the blocks of the report as text."""

from __future__ import annotations

from typing import Callable, Iterable, List, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from bnb_core.cli.demo.document import Block, Heading, Paragraph, Sample, Table

Result = TypeVar("Result")


def show(console: Console, blocks: Iterable[Block]) -> None:
    """Print these blocks, all but figures: the report has those."""
    for block in blocks:
        if isinstance(block, Heading):
            console.print(Text(f"\n{block.text}", style="bold cyan"))
        elif isinstance(block, Paragraph):
            console.print(Text(block.text))
        elif isinstance(block, Table):
            console.print(_table(block))
        elif isinstance(block, Sample):
            console.print(Text(block.label, style="bold"))
            console.print(Padding(Text(block.text), (0, 0, 1, 2)))


def collect(console: Console, label: str, results: Iterable[Result], total: int, describe: Callable[[Result], str]) -> List[Result]:
    """Return all the results, and show a bar that tells how many of `total` are there and what the last one was."""
    collected: List[Result] = []
    last = TextColumn("{task.fields[last]}")
    columns = (TextColumn("{task.description:14}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), last)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(escape(label), total=total, last="")
        for result in results:
            collected.append(result)
            progress.update(bar, advance=1, last=describe(result))
    return collected


def _table(table: Table) -> RichTable:
    rendered = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for number, column in enumerate(table.columns):
        rendered.add_column("\n".join(column.rsplit(" ", 1)), justify="right" if number else "left", no_wrap=True)
    for row in table.rows:
        rendered.add_row(*map(Text, row))
    return rendered
