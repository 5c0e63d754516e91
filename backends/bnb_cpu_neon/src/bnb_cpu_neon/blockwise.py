"""8-bit blockwise ops: each hands its tensors to the native kernel of the same name."""

from __future__ import annotations

from typing import Tuple

import torch

from bnb_cpu_neon import engine
from bnb_cpu_neon.engine import DTYPES, kernel


@kernel("quantize_blockwise")
def quantize_blockwise(x: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fill `out` with the code of each element and the absmax of each block."""
    engine.native.quantize_blockwise(DTYPES[x.dtype], x, x.numel(), codebook, blocksize, *out, torch.get_num_threads())


@kernel("dequantize_blockwise")
def dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, *, out: torch.Tensor
) -> None:
    """Fill `out` with codebook[code] * absmax."""
    engine.native.dequantize_blockwise(
        codes, absmax, codebook, blocksize, out.numel(), DTYPES[out.dtype], out, torch.get_num_threads()
    )
