"""Hardware that a backend could use, found without loading a driver or creating a device context."""

from __future__ import annotations

import os
from typing import Iterable

from bnb_core.backends.discovery import INSTALL_HINTS, Entry

#: Device nodes and files of NVIDIA's drivers: discrete GPUs, and the integrated ones of Jetson boards.
NVIDIA_NODES = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu")


def missing_backend(entries: Iterable[Entry]) -> str:
    """Say which hardware here has no backend installed for it; empty if none is missing. Entries that are to count are loaded."""
    # By name too: one that is installed but broken has no kernels to look at, and its own message.
    served = any(
        entry.name == "jetson" or (entry.backend and any("cuda" in kernel.devices for kernel in entry.backend.kernels.values()))
        for entry in entries
    )
    if served or not any(map(os.path.exists, NVIDIA_NODES)):
        return ""
    return f"an NVIDIA GPU is present but no CUDA backend is installed; {INSTALL_HINTS['jetson']}"
