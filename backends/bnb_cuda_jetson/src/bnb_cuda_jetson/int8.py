"""Kernels of LLM.int8."""
