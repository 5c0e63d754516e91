"""LAMB, with 32-bit and 8-bit states."""

from bitsandbytes.optim._classes import subclasses

LAMB, LAMB8bit, LAMB32bit = subclasses(__name__, "LAMB", "LAMB8bit", "LAMB32bit")

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]
