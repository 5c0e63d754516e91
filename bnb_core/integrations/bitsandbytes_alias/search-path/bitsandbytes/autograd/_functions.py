"""Products of an activation and a quantized weight."""

from bnb_core.quantization.products import MatmulLtState, matmul, matmul_4bit

__all__ = ["MatmulLtState", "matmul", "matmul_4bit"]
