"""Adagrad, with 32-bit and 8-bit states."""

from bitsandbytes.optim._classes import subclasses

Adagrad, Adagrad8bit, Adagrad32bit = subclasses(__name__, "Adagrad", "Adagrad8bit", "Adagrad32bit")

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]
