"""Products with 4-bit weights: each hands its tensors to the native kernel of the same name."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.backends import Call
from bnb_core.ops import Nested
from bnb_cpu_neon import engine
from bnb_cpu_neon.engine import DTYPES, kernel
from bnb_cpu_neon.precision import current_precision

_FLOAT = 4


def _gemm_scratch(call: Call) -> int:
    return _FLOAT * int(engine.native.gemm_4bit_scratch(call.x.numel() // call.K, call.K))


def _gemm_transposed_scratch(call: Call) -> int:
    return _FLOAT * int(engine.native.gemm_4bit_transposed_scratch(call.g.numel() // call.N, call.N))


def _grouped_scratch(call: Call) -> int:
    return _FLOAT * int(engine.native.grouped_gemm_4bit_scratch(call.x.shape[0], call.K))


def _fast(K: int, blocksize: int) -> bool:
    """Tell whether to take the fast kernels, which need no other scratch memory and whole blocks in each row."""
    return current_precision() == "fast" and K % blocksize == 0


@kernel("gemm_4bit", scratch=_gemm_scratch)
def gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor],
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with x W^T + bias."""
    weight = (packed, absmax, codebook, blocksize, nested, N, K)
    multiply = engine.native.fast_gemm_4bit if _fast(K, blocksize) else engine.native.gemm_4bit
    multiply(DTYPES[x.dtype], x, x.numel() // K, *weight, bias, out, scratch, torch.get_num_threads())


@kernel("gemm_4bit_transposed", scratch=_gemm_transposed_scratch)
def gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with g W."""
    weight = (packed, absmax, codebook, blocksize, nested, N, K)
    engine.native.gemm_4bit_transposed(DTYPES[g.dtype], g, g.numel() // N, *weight, out, scratch, torch.get_num_threads())


@kernel("grouped_gemm_4bit", scratch=_grouped_scratch)
def grouped_gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with each token's product with its expert's weight."""
    experts = (offsets, len(packed), packed, absmax, codebook, blocksize, nested, N, K)
    multiply = engine.native.fast_grouped_gemm_4bit if _fast(K, blocksize) else engine.native.grouped_gemm_4bit
    multiply(DTYPES[x.dtype], x, *experts, out, scratch, torch.get_num_threads())


@kernel("grouped_gemm_4bit_transposed", scratch=_gemm_transposed_scratch)
def grouped_gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with the product of each token's gradient and its expert's weight."""
    experts = (offsets, len(packed), packed, absmax, codebook, blocksize, nested, N, K)
    engine.native.grouped_gemm_4bit_transposed(DTYPES[g.dtype], g, *experts, out, scratch, torch.get_num_threads())
