"""4-bit ops: each hands its tensors to the native kernel of the same name."""

from __future__ import annotations

from typing import Optional, Tuple

import torch

from bnb_core.ops import Nested
from bnb_cpu_neon import engine
from bnb_cpu_neon.engine import DTYPES, kernel


@kernel("quantize_4bit")
def quantize_4bit(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the packed codes and the absmax of each block."""
    engine.native.quantize_4bit(DTYPES[x.dtype], x, x.numel(), codebook, blocksize, *out, torch.get_num_threads())


@kernel("dequantize_4bit")
def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with codebook[code] * absmax."""
    engine.native.dequantize_4bit(
        packed, absmax, codebook, blocksize, nested, out.numel(), DTYPES[out.dtype], out, torch.get_num_threads()
    )
