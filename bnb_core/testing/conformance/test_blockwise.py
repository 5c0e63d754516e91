"""8-bit blocks: every code and every scale, to the bit."""

from __future__ import annotations

import pytest
import torch

from bnb_core.testing import cases
from bnb_core.testing.subject import KernelUnderTest, for_ops

#: Unlike the 4-bit ops, these take any positive blocksize.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 1, 100)


@for_ops("quantize_blockwise")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(blocksize=BLOCKSIZES, codebook=cases.CODEBOOKS_8BIT, values=tuple(cases.KINDS), size=range(cases.SIZES)),
    ids=str,
)
def test_quantize_blockwise(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    codebook = cases.codebooks(256)[case.codebook]
    n = cases.sizes(case.blocksize)[case.size]
    x = cases.values(case.values, n, case.blocksize, bnb_kernel.dtype, codebook)
    bnb_kernel.verify(x, codebook, case.blocksize)


@for_ops("quantize_blockwise")
@pytest.mark.parametrize("n", [2, 64, 65, 100])
def test_quantize_blockwise_multiplies_by_the_reciprocal(bnb_kernel: KernelUnderTest, n: int) -> None:
    block, codebook = cases.division_shows(bnb_kernel.dtype, 256)
    bnb_kernel.verify(block.repeat(n)[:n], codebook, 64)


@for_ops("quantize_blockwise")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 5), (1, 1)], ids=str)
def test_quantize_blockwise_shape(bnb_kernel: KernelUnderTest, shape: "tuple[int, ...]") -> None:
    bnb_kernel.verify(cases.activations("normal", shape, bnb_kernel.dtype), cases.codebooks(256)["dynamic"], 64)


@for_ops("dequantize_blockwise")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(blocksize=BLOCKSIZES, codebook=cases.CODEBOOKS_8BIT, absmax=tuple(cases.ABSMAX), size=range(cases.SIZES)),
    ids=str,
)
def test_dequantize_blockwise(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    n = cases.sizes(case.blocksize)[case.size]
    codes = cases.bytes_of(n)
    absmax = cases.absmax(case.absmax, -(-n // case.blocksize))
    bnb_kernel.verify(codes, absmax, cases.codebooks(256)[case.codebook], case.blocksize, bnb_kernel.dtype)


@for_ops("dequantize_blockwise")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 5)], ids=str)
def test_dequantize_blockwise_shape(bnb_kernel: KernelUnderTest, shape: "tuple[int, ...]") -> None:
    codes = torch.zeros(shape, dtype=torch.uint8) + 200
    absmax = cases.absmax("ordinary", -(-codes.numel() // 64))
    bnb_kernel.verify(codes, absmax, cases.codebooks(256)["dynamic"], 64, bnb_kernel.dtype)
