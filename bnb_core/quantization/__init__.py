"""Quantize, dequantize and multiply, with bitsandbytes' names and defaults."""

from bnb_core.quantization.codebooks import get_codebook
from bnb_core.quantization.products import MatmulLtState, matmul, matmul_4bit
from bnb_core.quantization.state import QuantState

__all__ = ["MatmulLtState", "QuantState", "get_codebook", "matmul", "matmul_4bit"]
