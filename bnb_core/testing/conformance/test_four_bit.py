"""4-bit blocks: every code, every scale and every dequantized value, to the bit."""

from __future__ import annotations

import pytest
import torch

from bnb_core.ops.spec import BLOCKSIZES_4BIT
from bnb_core.testing import cases
from bnb_core.testing.subject import KernelUnderTest, for_ops


@for_ops("quantize_4bit")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(blocksize=BLOCKSIZES_4BIT, codebook=cases.CODEBOOKS_4BIT, values=tuple(cases.KINDS), size=range(cases.SIZES)),
    ids=str,
)
def test_quantize_4bit(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    codebook = cases.codebooks(16)[case.codebook]
    n = cases.sizes(case.blocksize)[case.size]
    x = cases.values(case.values, n, case.blocksize, bnb_kernel.dtype, codebook)
    bnb_kernel.verify(x, codebook, case.blocksize)


@for_ops("quantize_4bit")
@pytest.mark.parametrize("n", [2, 64, 65, 100])
def test_quantize_4bit_multiplies_by_the_reciprocal(bnb_kernel: KernelUnderTest, n: int) -> None:
    block, codebook = cases.division_shows(bnb_kernel.dtype, 16)
    bnb_kernel.verify(block.repeat(n)[:n], codebook, 64)


@for_ops("quantize_4bit")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 5), (1, 1)], ids=str)
def test_quantize_4bit_shape(bnb_kernel: KernelUnderTest, shape: "tuple[int, ...]") -> None:
    bnb_kernel.verify(cases.activations("normal", shape, bnb_kernel.dtype), cases.codebooks(16)["nf4"], 64)


@for_ops("dequantize_4bit")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(blocksize=BLOCKSIZES_4BIT, codebook=cases.CODEBOOKS_4BIT, absmax=tuple(cases.ABSMAX), size=range(cases.SIZES)),
    ids=str,
)
def test_dequantize_4bit(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    n = cases.sizes(case.blocksize)[case.size]
    packed, absmax, codebook, blocksize = cases.weight_4bit(n, case.blocksize, case.codebook).quantized
    absmax = cases.absmax(case.absmax, len(absmax))
    bnb_kernel.verify(packed, absmax, codebook, blocksize, (n,), bnb_kernel.dtype, None)


@for_ops("dequantize_4bit")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        blocksize=BLOCKSIZES_4BIT, nested_blocksize=(256, 64, 7, 1), scale=(1.0, 1e-30, 1e30), blocks=(1, 7, 256, 257, 600)
    ),
    ids=str,
)
def test_dequantize_4bit_nested(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    n = min(case.blocksize * case.blocks - 3, 1 << 16)
    weight = cases.weight_4bit(n, case.blocksize, "nf4", case.nested_blocksize, scale=case.scale)
    bnb_kernel.verify(*weight.quantized, (n,), bnb_kernel.dtype, weight.nested)


@for_ops("dequantize_4bit")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 5)], ids=str)
def test_dequantize_4bit_shape(bnb_kernel: KernelUnderTest, shape: "tuple[int, ...]") -> None:
    n = torch.empty(shape).numel()
    weight = cases.weight_4bit(n, 32)
    bnb_kernel.verify(*weight.quantized, shape, bnb_kernel.dtype, None)
