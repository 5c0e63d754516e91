"""`bnb run`: run a program, and the processes that it starts, with bnb_core in the place of bitsandbytes."""

from __future__ import annotations

import os
import shutil
import sys
from typing import List, Tuple

import click

from bnb_core.errors import BnbError
from bnb_core.integrations.bitsandbytes_alias import enable


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--force", is_flag=True, help="Hide the real bitsandbytes where it is installed.")
@click.option("-m", "as_module", is_flag=True, help="PROGRAM is a Python module, as for `python -m`.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(force: bool, as_module: bool, program: str, arguments: Tuple[str, ...]) -> None:
    """Run a program for which bitsandbytes is bnb_core.

    PROGRAM is a Python script, or else a command on the path, such as `accelerate launch train.py`. Everything after it is its own.
    """
    try:
        enable(force)
    except BnbError as error:
        raise click.ClickException(str(error)) from error
    command = [*_command(program, as_module), *arguments]
    sys.stdout.flush()
    # The program takes the place of this process: its path, its main module and its signals are as without `bnb run`.
    os.execv(command[0], command)


def _command(program: str, as_module: bool) -> List[str]:
    if as_module:
        return [sys.executable, "-m", program]
    if os.path.exists(program):
        return [sys.executable, program]
    found = shutil.which(program)
    if found is None:
        raise click.UsageError(f"{program!r} is neither a file nor a command; `bnb run -m {program}` runs a module of that name")
    return [found]
