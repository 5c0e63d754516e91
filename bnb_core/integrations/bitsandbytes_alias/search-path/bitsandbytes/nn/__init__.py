"""Modules with quantized weights: those of `bnb_core.nn`."""

from bitsandbytes.nn import modules
from bnb_core import nn
from bnb_core.nn import *  # noqa: F403

__all__ = [*nn.__all__, "modules"]
