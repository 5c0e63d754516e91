"""The backend, the native module once it is loaded, and the decorator that makes a function one of its kernels."""

from __future__ import annotations

import platform
from typing import Any, Callable, Iterable, Optional

import torch

from bnb_core.backends import YES, Backend, Call, Support
from bnb_cpu_neon.cpu import TIERS, Cpu, choose_tier, this_cpu
from bnb_cpu_neon.precision import current_precision, read_environment

__version__ = "0.1.0"

#: The dtypes that `T` stands for, with the number that the native module knows each by.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: The native module; None until `load` has found that this CPU can run it.
native: Any = None
#: The tier whose kernels run; empty until then.
tier = ""


def load() -> Support:
    """Load the native module for the best tier of this CPU, or say why that cannot be."""
    global native, tier
    try:
        read_environment()
        tier = choose_tier(this_cpu())
    except ValueError as error:
        return Support(False, str(error))
    try:
        from bnb_cpu_neon import _native
    except ImportError as error:
        return Support(False, f"the native module cannot be loaded ({error}); reinstall bnb-cpu-neon")
    if _native.__version__ != __version__:
        return Support(False, f"bnb_cpu_neon {__version__} found _native {_native.__version__}; reinstall bnb-cpu-neon")
    _native.set_tier(TIERS.index(tier))
    native = _native
    return YES


def describe() -> str:
    """Name the core, its features, the tier, the number of threads and the precision, for `bnb doctor`."""
    cpu: Cpu = this_cpu()
    count = torch.get_num_threads()
    used = f"tier {tier or 'none'}, {count} thread{'s' if count > 1 else ''}, {current_precision()} precision"
    if cpu.architecture != "aarch64":
        return f"NEON emulated on {cpu.architecture}, {used}"
    return f"{cpu.core}, {' '.join(sorted(cpu.features))}, {used}"


# Emulated NEON is for development: it must be asked for.
backend = Backend(
    "neon",
    api_version=(1, 0),
    priority=10 if platform.machine() == "aarch64" else -10,
    available=load,
    description=describe,
)


def kernel(
    op: str, dtypes: Iterable[torch.dtype] = tuple(DTYPES), scratch: Optional[Callable[[Call], int]] = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the decorated function as the backend's kernel for `op`; `scratch` says how many bytes of memory it needs."""
    return backend.kernel(op, devices={"cpu"}, dtypes=dtypes, scratch=scratch)
