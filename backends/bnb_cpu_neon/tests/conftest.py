"""Fixtures of the NEON backend's tests."""

import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import pytest


class Finished(NamedTuple):
    """A process that ended."""

    returncode: int
    output: str
    """Of both streams."""


@pytest.fixture
def run_python(tmp_path):
    """Run code in a new process, with environment variables: torch is loaded there, bnb_core and its backends are not.

    It is forked off a process that has loaded torch, which takes seconds where the CPU is emulated.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])

    def run(code: str, **environment: str) -> Finished:
        output = Path(tmp_path) / "output"
        output.touch()
        variables = {**os.environ, **environment}
        setup = f"import os; os.environ.update({variables!r}); file = os.open({str(output)!r}, os.O_WRONLY)"
        process = context.Process(target=exec, args=(f"{setup}; os.dup2(file, 1); os.dup2(file, 2)\n{code}", {}))
        process.start()
        process.join(120)
        returncode = process.exitcode
        process.kill()
        return Finished(returncode, output.read_text())

    return run
