"""Draw the demo's plots as PNG files."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, List, Sequence, Tuple

from bnb_core.cli.demo.encoder import EncoderResult
from bnb_core.cli.demo.formats import FormatResult
from bnb_core.cli.demo.language_model import LanguageResult
from bnb_core.cli.demo.training import TrainingResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Pixels of each plot: inches times dots an inch.
SIZE = (10.0, 4.2)
DPI = 120

#: Okabe and Ito's palette, which stays distinct under the common forms of colour blindness.
_BLACK, _BLUE, _VERMILION, _ORANGE, _GREEN = "#444444", "#0072B2", "#D55E00", "#E69F00", "#009E73"
_FORMAT_COLORS = (_BLACK, _BLUE, _VERMILION, _ORANGE, _GREEN)
_OPTIMIZER_COLORS = (_BLUE, _VERMILION)
_GRID = "#dddddd"
#: Steps that a smoothed loss is the mean of, in a long training.
_SMOOTHING = 25


def draw_encoder(results: Sequence[EncoderResult], path: Path) -> None:
    """Draw the memory of the linear layers beside the cosine similarity of every sentence, by format."""
    figure, quality = _format_figure(results)
    for row, (result, color) in enumerate(zip(results, _FORMAT_COLORS)):
        # Shifting the dots up and down by turns keeps equal values apart.
        heights = [row + 0.22 * ((index % 5) / 2 - 1) for index in range(len(result.cosines))]
        quality.scatter(result.cosines, heights, s=14, color=color, alpha=0.45, linewidths=0)
        quality.plot([result.cosine_mean] * 2, [row - 0.36, row + 0.36], color=color, linewidth=2.5)
    quality.set_title("Embeddings (dot: a sentence, line: the mean)")
    quality.set_xlabel(f"cosine similarity with the {results[0].label} embedding")
    _save(figure, path)


def draw_language_model(results: Sequence[LanguageResult], unit: str, path: Path) -> None:
    """Draw the memory of the linear layers beside the perplexity, by format."""
    figure, quality = _format_figure(results)
    original = results[0].perplexity
    quality.axvline(original, color=_GRID, linewidth=2, zorder=0)
    for row, (result, color) in enumerate(zip(results, _FORMAT_COLORS)):
        quality.scatter([result.perplexity], [row], s=70, color=color)
        point = (result.perplexity, row)
        quality.annotate(f"{result.perplexity:.3f}", point, xytext=(0, 8), textcoords="offset points", ha="center")
    highest = max(abs(result.perplexity - original) for result in results)
    margin = max(highest * 1.25, original * 0.01)
    quality.set_xlim(original - margin * 0.4, original + margin)
    quality.set_title("Perplexity on held-out text")
    quality.set_xlabel(f"perplexity, of a {unit} (lower is better)")
    _save(figure, path)


def draw_training(results: Sequence[TrainingResult], path: Path) -> None:
    """Draw the loss of each optimizer over the steps, and the difference of the second from the first below."""
    figure = _figure()
    losses, difference = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    first, second = results
    count = len(first.losses)
    width = max(1, min(_SMOOTHING, count // 10))
    centers = [start + (width + 1) / 2 for start in range(count - width + 1)]
    for result, color, style in zip(results, _OPTIMIZER_COLORS, ("-", "--")):
        label = f"{result.optimizer}, {result.state_bytes / 1e6:.2f} MB of state"
        losses.plot(range(1, count + 1), result.losses, color=color, alpha=0.18, linewidth=0.8)
        losses.plot(centers, _means(result.losses, width), style, color=color, linewidth=2, label=label)
    differences = _means([b - a for a, b in zip(first.losses, second.losses)], width)
    difference.axhline(0, color=_BLACK, linewidth=0.8)
    difference.plot(centers, differences, color=_OPTIMIZER_COLORS[1], linewidth=1.5)
    limit = max(0.05, 1.2 * max(map(abs, differences)))
    difference.set_ylim(-limit, limit)
    losses.set_title(f"The same weights and batches with two optimizers (thick: mean of {width} steps)")
    losses.set_ylabel("loss, nats a character")
    losses.legend(frameon=False)
    difference.set_xlabel("step")
    difference.set_ylabel("difference")
    for axes in (losses, difference):
        _clean(axes)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_xlim(0, count + 1)
    _save(figure, path)


def _figure() -> Figure:
    from matplotlib.figure import Figure  # not pyplot: that would choose a display

    return Figure(figsize=SIZE, dpi=DPI, constrained_layout=True)


def _format_figure(results: Sequence[FormatResult]) -> Tuple[Figure, Axes]:
    """Return a figure with the memory of each format drawn at the left, and empty axes with the same rows at the right."""
    figure = _figure()
    memory, quality = figure.subplots(1, 2, sharey=True)
    original = results[0].linear_bytes
    for row, (result, color) in enumerate(zip(results, _FORMAT_COLORS)):
        memory.barh(row, result.linear_bytes / 1e6, color=color, height=0.62)
        ratio = f"  {original / result.linear_bytes:.1f}x smaller" if row else ""
        end = (result.linear_bytes / 1e6, row)
        memory.annotate(f"{end[0]:.2f} MB{ratio}", end, xytext=(5, 0), textcoords="offset points", va="center")
    memory.set_yticks(range(len(results)))
    memory.set_yticklabels([result.label for result in results])
    memory.invert_yaxis()
    memory.set_xlim(0, original / 1e6 * 1.25)
    memory.set_title("Memory of the linear layers")
    memory.set_xlabel("MB")
    quality.grid(axis="x", color=_GRID, linewidth=0.8)
    for axes in (memory, quality):
        _clean(axes)
        axes.tick_params(axis="y", length=0)
    return figure, quality


def _clean(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)


def _means(values: List[float], width: int) -> List[float]:
    """Return the mean of each `width` consecutive values."""
    return [statistics.fmean(values[start : start + width]) for start in range(len(values) - width + 1)]


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(str(path), format="png", dpi=DPI)
