"""Products with 4-bit weights by way of dequantized panels and torch's own matrix product."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import current_stream, nested_addresses


def multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor],
    nested: Optional[Nested],
    transposed: bool,
    size: int,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with x W^T + bias, or where `transposed` with x W.

    Args:
        size: of a panel: its rows of W, or its columns where `transposed`.
        scratch: 2 * size * K bytes, or 2 * size * N where `transposed`.
    """
    device = x.get_device()
    lines, length = (K, N) if transposed else (N, K)
    x, out = x.detach().view(-1, length), out.view(-1, lines)
    for first in range(0, lines, size):
        count = min(size, lines - first)
        part = (0, N, first, count) if transposed else (first, count, 0, K)
        _native.gemm_4bit_panel(
            device,
            current_stream(device),
            scratch.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            codebook.data_ptr(),
            blocksize,
            N,
            K,
            *part,
            *nested_addresses(nested),
        )
        values = scratch[: 2 * count * length].view(torch.bfloat16)
        panel = values.view(N, count) if transposed else values.view(count, K).t()
        product = out[:, first : first + count]
        if bias is None:
            torch.mm(x, panel, out=product)
        else:
            torch.addmm(bias[first : first + count], x, panel, out=product)
