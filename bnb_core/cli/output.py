"""The look that commands share: a console, and tables without lines."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

#: Columns of text that goes to a file or a pipe, wide enough that a reason stays on its line.
UNATTENDED_WIDTH = 180


def console() -> Console:
    """Make a console for results, in which everything is shown as it is: `[reference]` in "bnb-core[reference]" is text."""
    return Console(width=None if sys.stdout.isatty() else UNATTENDED_WIDTH, markup=False, highlight=False, emoji=False)


def table(*headers: str) -> Table:
    """Make a table with these columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
    for header in headers:
        made.add_column(header, overflow="fold")
    return made
