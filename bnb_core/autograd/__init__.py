"""Products that have gradients, where bitsandbytes has them."""

from bnb_core.autograd import _functions

__all__ = ["_functions"]
