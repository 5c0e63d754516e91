"""Quantize, dequantize and multiply, with bitsandbytes' names and defaults."""

from bnb_core.quantization.codebooks import get_codebook
from bnb_core.quantization.state import QuantState

__all__ = ["QuantState", "get_codebook"]
