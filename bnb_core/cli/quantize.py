"""`bnb quantize`: convert a checkpoint on disk with `quantize_checkpoint`, and show how far it is."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Tuple

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from bnb_core.errors import BnbError


@click.command()
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="SRC")
@click.argument("destination", type=click.Path(path_type=Path), metavar="DST")
@click.option("--to", type=click.Choice(["nf4", "fp4", "int8"]), default="nf4", show_default=True, help="Format of the weights.")
@click.option(
    "--skip", multiple=True, metavar="PATTERN", help="Leave alone layers of this name, such as 'layers.*.mlp'. Repeatable."
)
@click.option("--double-quant/--no-double-quant", default=None, help="Quantize the block scales too (nf4, fp4). On by default.")
@click.option(
    "--compute-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype to multiply in (nf4, fp4); by default that of the checkpoint.",
)
@click.option(
    "--threshold", type=float, help="Inputs from which on columns are multiplied in floating point (int8). 6.0 by default."
)
@click.option("--device", default="cpu", show_default=True, help="Torch device that quantizes, such as cuda.")
@click.option("-v", "--verbose", is_flag=True, help="List every layer that was left alone, and why.")
def quantize(
    source: Path,
    destination: Path,
    to: str,
    skip: Tuple[str, ...],
    double_quant: Optional[bool],
    compute_dtype: Optional[str],
    threshold: Optional[float],
    device: str,
    verbose: bool,
) -> None:
    """Quantize the checkpoint in folder SRC into a new folder DST, a few megabytes at a time.

    SRC holds config.json and safetensors files. transformers loads DST by from_pretrained, and bnb_core by load_quantized. A run
    that was killed goes on where it was when the same command is given again.
    """
    import torch

    from bnb_core.integrations.checkpoint_folder import CheckpointFolder
    from bnb_core.integrations.streaming import quantize_checkpoint

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        total = sum(entry.nbytes for entry in CheckpointFolder(source).entries.values())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(f"{source.name} to {to}", total=total)
            report = quantize_checkpoint(
                source,
                destination,
                to,
                skip=skip,
                double_quant=double_quant,
                compute_dtype=None if compute_dtype is None else getattr(torch, compute_dtype),
                threshold=threshold,
                device=device,
                progress=lambda count, _: bar.advance(task, count),
            )
    except BnbError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(report) if verbose else report.summary())
    click.echo(f"written to {destination}")
