"""What differs between a CPU and other devices."""

from __future__ import annotations

import torch

#: Elements to work on at a time. In float32 they take 2 MB on a CPU, to stay in its caches between operations, ...
CPU_PIECE = 1 << 19
#: ... and 16 MB elsewhere, to fill a GPU.
DEVICE_PIECE = 1 << 22


def piece_size(device: torch.device) -> int:
    """Return how many elements to work on at a time."""
    return CPU_PIECE if device.type == "cpu" else DEVICE_PIECE


def reads_are_free(device: torch.device) -> bool:
    """Say whether Python may read a tensor's values; elsewhere it would wait for the device, and fail in a CUDA graph's capture."""
    return device.type == "cpu"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether the device is a CPU with instructions for products of bfloat16 matrices (AVX512-BF16), and torch uses them."""
    supported = getattr(getattr(torch, "cpu", None), "_is_avx512_bf16_supported", None)  # from torch 2.6 on
    return device.type == "cpu" and supported is not None and supported()
