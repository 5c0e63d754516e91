"""Kernels of 4-bit matrix products."""
