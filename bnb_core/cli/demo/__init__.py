"""`bnb demo`: quantize a real model, train one with 8-bit optimizer states, and write a report with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bnb-demo"),
    show_default=True,
    help="Folder for the report, the plots and results.json.",
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Compare the formats on this local transformers checkpoint (encoder or causal language model) instead.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps with each optimizer.  [default: 600, or 60 with --quick]")
@click.option("--seed", type=int, help="Seed of the trained weights, the batches and the text that is written.  [default: 0]")
@click.option("--device", help="Where to run, such as cpu or cuda:0.  [default: cuda if there is one, otherwise cpu]")
@click.option("--quick", is_flag=True, help="Train and measure less, to see everything once in a few seconds.")
def demo(
    output: Path, model: Optional[Path], steps: Optional[int], seed: Optional[int], device: Optional[str], quick: bool
) -> None:
    """Show what quantization does to real models.

    A sentence encoder is put into LLM.int8(), NF4 and FP4; a small language model is trained with 32-bit and with 8-bit
    AdamW, and then quantized too. Tables appear here; a report with plots lands in the output folder. Nothing is
    downloaded.
    """
    from bnb_core.cli.demo.run import run  # here, so that `bnb --help` needs neither torch nor rich

    if model is not None and (steps is not None or seed is not None):
        raise click.UsageError("--steps and --seed are for the training, which --model replaces; leave out one or the other")
    run(output, model, steps, seed or 0, device, quick)
