"""Products of an activation and a quantized weight."""

from bitsandbytes.cextension import not_provided
from bnb_core.autograd import _functions
from bnb_core.autograd._functions import *  # noqa: F403

GlobalOutlierPooler = not_provided("autograd._functions.GlobalOutlierPooler", "leave it out: nothing in bitsandbytes uses it")

__all__ = [*_functions.__all__, "GlobalOutlierPooler"]
