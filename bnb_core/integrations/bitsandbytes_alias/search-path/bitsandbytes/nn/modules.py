"""Modules with quantized weights, and what goes with them."""

from bnb_core.nn import modules
from bnb_core.nn.modules import *  # noqa: F403

__all__ = [*modules.__all__]
