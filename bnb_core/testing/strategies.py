"""Hypothesis strategies for arguments of ops."""

from __future__ import annotations

from typing import List, Tuple

import torch
from hypothesis import strategies as st

from bnb_core.ops.spec import BLOCKSIZES_4BIT
from bnb_core.testing import cases


def floats(dtype: torch.dtype) -> "st.SearchStrategy[float]":
    """Any value of a dtype: subnormal numbers, infinities and NaN included."""
    if dtype == torch.bfloat16:
        patterns = st.integers(-(2**15), 2**15 - 1)
        return patterns.map(lambda bits: torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16).item())
    return st.floats(width=16 if dtype == torch.float16 else 32)


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype, max_size: int = 300) -> torch.Tensor:
    """A vector of a few distinct values, in an order of their own, so that blocks of many kinds are short to describe."""
    palette: List[float] = draw(st.lists(floats(dtype), min_size=1, max_size=6))
    size = draw(st.integers(1, max_size))
    seed = draw(st.integers(0, 2**16))
    return torch.tensor(palette, dtype=dtype)[torch.from_numpy(cases.random(seed).integers(0, len(palette), size))]


@st.composite
def codebooks(draw: st.DrawFn, entries: int) -> torch.Tensor:
    """A codebook of numbers between -1 and 1, in any order, some perhaps equal."""
    values = draw(st.lists(st.floats(-1, 1, width=32, allow_subnormal=False), min_size=2, max_size=16))
    return torch.tensor(values)[torch.arange(entries) * 7 % len(values)].contiguous()


@st.composite
def quantize_arguments(draw: st.DrawFn, dtype: torch.dtype, entries: int) -> Tuple[torch.Tensor, torch.Tensor, int]:
    """Values, codebook and blocksize of `quantize_4bit` (16 entries) or `quantize_blockwise` (256)."""
    blocksize = draw(st.sampled_from(BLOCKSIZES_4BIT)) if entries == 16 else draw(st.integers(1, 300))
    return draw(tensors(dtype)), draw(codebooks(entries)), blocksize


@st.composite
def weight_shapes(draw: st.DrawFn) -> Tuple[int, int, int, int]:
    """N, K, blocksize and nested blocksize (0 for plain scales) of a 4-bit weight."""
    N, K = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    return N, K, draw(st.sampled_from(BLOCKSIZES_4BIT)), draw(st.sampled_from([0, 256, 64, 3]))


@st.composite
def rows(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    """A matrix for LLM.int8, of ordinary and of odd values."""
    columns = draw(st.integers(1, 40))
    values = draw(tensors(dtype))
    return values.repeat(columns)[: len(values) // columns * columns or columns].view(-1, columns)
