"""A page of headings, paragraphs, tables, figures and text samples, written as Markdown or as one HTML file."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import NamedTuple, Sequence, Union


class Heading(NamedTuple):
    """A heading; level 1 is the title of the page."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """Plain text."""

    text: str


class Table(NamedTuple):
    """Cells of plain text; all columns but the first hold numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """A PNG file beside the page."""

    path: Path
    description: str


class Sample(NamedTuple):
    """Text to show as it is, with its line breaks."""

    label: str
    text: str


Block = Union[Heading, Paragraph, Table, Figure, Sample]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #ddd; text-align: left; }
th:not(:first-child), td:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
pre { background: #f5f5f5; padding: 0.75rem; white-space: pre-wrap; }
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return the page as Markdown that names the figures' files."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """Return the page as HTML that holds the figures itself."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html(block) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Figure):
        return f"![{block.description}]({block.path.name})"
    if isinstance(block, Sample):
        return f"{block.label}:\n\n" + "\n".join(f"    {line}" for line in block.text.splitlines())
    rule = ["---"] + ["---:"] * (len(block.columns) - 1)
    rows = [rule if row is rule else [_escaped(cell) for cell in row] for row in (block.columns, rule, *block.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Figure):
        data = base64.b64encode(block.path.read_bytes()).decode("ascii")
        return f'<img alt="{html.escape(block.description)}" src="data:image/png;base64,{data}">'
    if isinstance(block, Sample):
        return f"<p>{html.escape(block.label)}:</p>\n<pre>{html.escape(block.text)}</pre>"
    rows = [_html_row("th", block.columns), *(_html_row("td", row) for row in block.rows)]
    return "\n".join(["<table>", *rows, "</table>"])


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
