"""Kernels of 8-bit blockwise quantization."""
