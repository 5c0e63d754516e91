"""SGD, with 32-bit and 8-bit states."""

from bitsandbytes.optim._classes import subclasses

SGD, SGD8bit, SGD32bit = subclasses(__name__, "SGD", "SGD8bit", "SGD32bit")

__all__ = ["SGD", "SGD8bit", "SGD32bit"]
