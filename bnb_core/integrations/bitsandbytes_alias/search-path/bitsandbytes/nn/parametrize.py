"""4-bit storage for any parameter of any module."""

from bnb_core.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit, replace_parameter_4bit_prequantized

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]
