"""LARS, with 32-bit and 8-bit states."""

from bitsandbytes.optim._classes import subclasses
from bnb_core.optim import PytorchLARS

LARS, LARS8bit, LARS32bit = subclasses(__name__, "LARS", "LARS8bit", "LARS32bit")

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]
