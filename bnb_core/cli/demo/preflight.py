"""Check what the demo needs before it spends time on anything."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional

import click
import torch

import bnb_core
from bnb_core.backends import selection
from bnb_core.cli.demo.minilm import PACKAGE


def check_packages(built_in: bool) -> None:
    """Raise if a package is missing that the plots, or the built-in encoder, need."""
    needed = ("matplotlib", "safetensors", "tokenizers", PACKAGE) if built_in else ("matplotlib",)
    missing = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"the demo needs {', '.join(missing)}; pip install bnb-core[demo]")


def prepare_folder(output: Path) -> None:
    """Make the folder, and raise if nothing can be written there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise click.ClickException(f"cannot write to {output}: {error.strerror}; choose another folder with --output") from error


def choose_device(name: Optional[str]) -> torch.device:
    """Return the device of that name, or the best one without a name; raise if torch cannot use it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise click.BadParameter(f"cannot use {name!r}: {reason}", param_hint="--device") from error
    return device


def describe(device: torch.device, seed: int) -> Dict[str, Any]:
    """Return what the results depend on besides the code, for `results.json`.

    Raises:
        BackendError: no backend can run on the device, or one that was asked for cannot be had.
    """
    chain = selection.current().chain(device.type)
    return {
        "bnb_core": bnb_core.__version__,
        "backends": [backend.name for backend in chain],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }
