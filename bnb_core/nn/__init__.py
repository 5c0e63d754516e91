"""Modules with quantized weights, and their parameters."""

from bnb_core.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from bnb_core.nn.linear8bit import Linear8bitLt
from bnb_core.nn.parameters import Int8Params, Params4bit

__all__ = ["Int8Params", "Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4", "Params4bit"]
