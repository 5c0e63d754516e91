"""Put the demo's results into words and tables, and into files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

from bnb_core.backends.discovery import REFERENCE_NAME
from bnb_core.cli.demo.document import Block, Figure, Heading, Paragraph, Sample, Table, to_html, to_markdown
from bnb_core.cli.demo.encoder import EncoderResult
from bnb_core.cli.demo.formats import FormatResult
from bnb_core.cli.demo.language_model import LanguageResult
from bnb_core.cli.demo.sentences import QUERIES, SENTENCES
from bnb_core.cli.demo.training import TrainingResult

#: Formats whose text samples are shown: what one format changes in the text says enough.
SAMPLED = ("nf4",)


def opening_blocks(environment: Dict[str, Any]) -> List[Block]:
    """Return the title, and what the demo runs on."""
    where = f"{environment['device']} ({environment['device_name']}, {environment['threads']} CPU threads)"
    versions = f"bnb-core {environment['bnb_core']}, torch {environment['torch']}, Python {environment['python']}"
    blocks: List[Block] = [
        Heading("bnb demo", level=1),
        Paragraph(f"{versions}. Device: {where}. Backend: {', then '.join(environment['backends'])}."),
    ]
    if environment["backends"] == [REFERENCE_NAME]:
        blocks.append(
            Paragraph(
                "Note: only the reference backend runs here, every op in plain PyTorch. Memory and accuracy are those of any "
                "backend, but the times say nothing about one that is made for a device; bnb doctor shows what is installed."
            )
        )
    return blocks


def encoder_blocks(results: Sequence[EncoderResult], figure: Path) -> List[Block]:
    """Return the section on the sentence encoder."""
    original = results[0]
    rows = [
        [
            *_memory_cells(result, original),
            f"{result.cosine_mean:.4f}",
            f"{result.cosine_min:.4f}",
            f"{result.top1:.0%}",
            f"{result.top3:.0%}",
            f"{result.kendall:.3f}",
            f"{result.seconds_per_batch * 1e3:.0f}",
        ]
        for result in results
    ]
    return [
        Paragraph(
            f"{_size(original)} {len(SENTENCES)} sentences and {len(QUERIES)} queries are embedded in one batch. Cosine: of an "
            f"embedding with the one in {original.label}. Top 1, top 3: how many of the sentences that a query finds first stay. "
            "Tau: Kendall's rank correlation with the original order of all sentences."
        ),
        Table([*_MEMORY_COLUMNS, "cosine mean", "cosine min", "top 1", "top 3", "rank tau", "ms a batch"], rows),
        Paragraph(_found(results)),
        Figure(figure, "Memory of the linear layers and cosine similarity of the embeddings, by format"),
    ]


def training_blocks(results: Sequence[TrainingResult], figure: Path) -> List[Block]:
    """Return the section on training with 32-bit and 8-bit optimizer states."""
    first, second = results
    rows = [
        [
            result.optimizer,
            f"{result.state_bytes / 1e6:.2f}",
            f"{result.final_loss:.3f}",
            f"{result.perplexity:.2f}",
            f"{result.seconds:.1f}",
        ]
        for result in results
    ]
    return [
        Paragraph(
            "A character-level GPT learns Python's language reference, once with each optimizer, from the same weights and "
            f"batches. {second.optimizer} keeps its state in {first.state_bytes / second.state_bytes:.1f} times less memory."
        ),
        Table(["optimizer", "state MB", "final loss", "held-out perplexity", "seconds"], rows),
        Figure(figure, f"Loss of {first.optimizer} and {second.optimizer}, and their difference"),
    ]


def language_blocks(unit: str, results: Sequence[LanguageResult], figure: Path) -> List[Block]:
    """Return the section on a language model in every format."""
    original = results[0]
    shown = (original.format, *SAMPLED)
    rows = [
        [*_memory_cells(result, original), f"{result.perplexity:.3f}", f"{result.perplexity / original.perplexity - 1:+.2%}"]
        for result in results
    ]
    return [
        Paragraph(
            f"{_size(original)} Perplexity: of a {unit}, in a part of Python's language reference that nothing was trained on."
        ),
        Table([*_MEMORY_COLUMNS, "perplexity", "change"], rows),
        *(Sample(f"Written in {result.label}", result.sample.strip()) for result in results if result.format in shown),
        Figure(figure, "Memory of the linear layers and perplexity, by format"),
    ]


def write(output: Path, blocks: Sequence[Block], results: Dict[str, Any]) -> List[Path]:
    """Write the report as HTML and as Markdown, and the results as JSON, into the folder that the figures are in.

    Returns:
        Every file of the report, the figures included.
    """
    texts = {
        "report.html": to_html(blocks),
        "report.md": to_markdown(blocks),
        "results.json": json.dumps(results, indent=2) + "\n",
    }
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    return [*(output / name for name in texts), *(block.path for block in blocks if isinstance(block, Figure))]


_MEMORY_COLUMNS = ("format", "weights MB", "linears MB", "ratio")


def _memory_cells(result: FormatResult, original: FormatResult) -> List[str]:
    return [
        result.label,
        f"{result.weight_bytes / 1e6:.2f}",
        f"{result.linear_bytes / 1e6:.2f}",
        f"{original.linear_bytes / result.linear_bytes:.1f}x",
    ]


def _size(result: FormatResult) -> str:
    return (
        f"{result.parameters:,} parameters, in {result.weight_bytes / 1e6:.1f} MB. The {result.linear_layers} "
        f"linear layers ({result.linear_bytes / result.weight_bytes:.0%}) are quantized; all else stays in {result.label}."
    )


def _found(results: Sequence[EncoderResult]) -> str:
    """Say which queries find another sentence than before, and in which format."""
    original = results[0]
    changes = [
        f"in {result.label}, \u201c{query}\u201d finds \u201c{now}\u201d instead of \u201c{before}\u201d"
        for result in results[1:]
        for query, now, before in zip(QUERIES, result.found, original.found)
        if now != before
    ]
    if changes:
        return "Not every query finds the same sentence first: " + "; ".join(changes) + "."
    example = f"\u201c{QUERIES[0]}\u201d finds \u201c{original.found[0]}\u201d"
    return f"Every query finds the same sentence first in each format; {example}"
