"""Kill `quantize_checkpoint` at each of its steps, and have it go on: `python kill_everywhere.py SOURCE FOLDER`.

Steps are what it does to files, and its reports of progress. After each kill the destination must be missing, or complete; after
the next run it must have the bytes that one run without a kill gives. Prints how many steps there were.
"""

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import bnb_core as bnb

TO_FILES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile")


def content(folder):
    """Return the names and digests of all files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run(source, destination, last_step=None):
    """Quantize in a process of its own, which is killed at a step; return its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    steps = 0

    def step(*_):
        nonlocal steps
        steps += 1
        if steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        if event in TO_FILES and str(destination) in str(arguments[:2]):
            step()

    sys.addaudithook(watch)
    bnb.quantize_checkpoint(source, destination, progress=step)
    os._exit(0)


def main(source, folder):
    """Kill at the first step, then at the second, and so on."""
    torch.set_num_threads(1)
    source, folder = Path(source), Path(folder)
    whole, destination = folder / "whole", folder / "destination"
    bnb.quantize_checkpoint(source, whole)  # here, so that the processes that are forked have loaded all that they need
    expected = content(whole)
    last_step = 0
    while True:
        last_step += 1
        status = run(source, destination, last_step)
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        if not destination.exists():
            assert run(source, destination) == 0, last_step
        assert content(destination) == expected, last_step
        assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == ["destination", "whole"], last_step
        shutil.rmtree(destination)
    print(last_step - 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
