"""Kernels that quantize and dequantize."""
