"""The command `bnb`. Each subcommand is a module of its own, imported when it runs."""

from __future__ import annotations

import importlib
from typing import List, Mapping, Optional, Tuple

import click

import bnb_core

#: Subcommands: the module, which has a click command of the same name, and the line that `bnb --help` shows.
COMMANDS: Mapping[str, Tuple[str, str]] = {
    "demo": ("bnb_core.cli.demo", "Quantize a real model, train with 8-bit AdamW, and write a report with plots."),
    "doctor": ("bnb_core.cli.doctor", "Show backends, who runs which op, and what is wrong."),
    "quantize": ("bnb_core.cli.quantize", "Quantize a checkpoint on disk, in little memory; resumable."),
    "run": ("bnb_core.cli.run", "Run a program for which bitsandbytes is bnb_core."),
    "tune": ("bnb_core.cli.tune", "Measure which kernels are the fastest on this machine, and use these from then on."),
}


class _Commands(click.Group):
    """A group whose help needs none of its commands."""

    def list_commands(self, ctx: click.Context) -> List[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=_Commands)
@click.version_option(bnb_core.__version__, prog_name="bnb-core")
def main() -> None:
    """8-bit optimizers, LLM.int8() and NF4/FP4 quantization for PyTorch."""
