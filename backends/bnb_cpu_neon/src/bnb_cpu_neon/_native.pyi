"""The native module, as far as type checkers need to know it."""

from typing import Any

__version__: str

def set_tier(tier: int) -> None:
    """Use the kernels of a tier, by its place in `cpu.TIERS`."""

def __getattr__(name: str) -> Any:
    """Return a kernel."""
