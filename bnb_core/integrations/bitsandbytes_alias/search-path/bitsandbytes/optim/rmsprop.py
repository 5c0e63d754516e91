"""RMSprop, with 32-bit and 8-bit states."""

from bitsandbytes.optim._classes import subclasses

RMSprop, RMSprop8bit, RMSprop32bit = subclasses(__name__, "RMSprop", "RMSprop8bit", "RMSprop32bit")

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]
