"""Products with 4-bit weights: every element within its bound, and every single weight in its place."""

from __future__ import annotations

from typing import Tuple

import pytest
import torch

from bnb_core.ops.spec import BLOCKSIZES_4BIT
from bnb_core.testing import cases
from bnb_core.testing.subject import KernelUnderTest, for_ops

#: Rows and columns of the weight: odd, no multiples of blocksizes, blocks that straddle rows, rows within one block, whole tiles.
WEIGHTS = ((1, 1), (3, 5), (7, 33), (16, 64), (5, 97), (33, 127), (64, 256), (2, 1031), (129, 70), (8, 4096))
FACTORS = {
    "shape": WEIGHTS,
    "blocksize": BLOCKSIZES_4BIT,
    "rows": (0, 1, 2, 3, 5, 8, 17, 64),
    "values": ("normal", "positive", "cancelling", "spiky"),
    "codebook": ("nf4", "fp4", "unsorted", "zeroless"),
    "nested_blocksize": (0, 256, 64, 7),
}


@for_ops("gemm_4bit")
@pytest.mark.parametrize("case", cases.pairwise(**FACTORS, bias=(False, True)), ids=str)
def test_gemm_4bit(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    N, K = case.shape
    weight = cases.weight_4bit(N * K, case.blocksize, case.codebook, case.nested_blocksize)
    x = cases.activations(case.values, (case.rows, K), bnb_kernel.dtype)
    bias = cases.bias(N, bnb_kernel.dtype) if case.bias else None
    bnb_kernel.verify(x, *weight.quantized, N, K, bias, weight.nested)


@for_ops("gemm_4bit_transposed")
@pytest.mark.parametrize("case", cases.pairwise(**FACTORS), ids=str)
def test_gemm_4bit_transposed(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    N, K = case.shape
    weight = cases.weight_4bit(N * K, case.blocksize, case.codebook, case.nested_blocksize)
    g = cases.activations(case.values, (case.rows, N), bnb_kernel.dtype)
    bnb_kernel.verify(g, *weight.quantized, N, K, weight.nested)


@for_ops("gemm_4bit", "gemm_4bit_transposed")
@pytest.mark.parametrize("nested_blocksize", [0, 256])
@pytest.mark.parametrize(("N", "K", "blocksize"), [(7, 33, 32), (9, 300, 64), (16, 64, 32), (3, 130, 128)])
def test_each_weight(bnb_kernel: KernelUnderTest, N: int, K: int, blocksize: int, nested_blocksize: int) -> None:
    """Rows with a single 1 show one weight each, so that none can hide in the bound of a sum."""
    weight = cases.weight_4bit(N * K, blocksize, "nf4", nested_blocksize)
    width = K if bnb_kernel.spec.name == "gemm_4bit" else N
    rest = (None, weight.nested) if bnb_kernel.spec.name == "gemm_4bit" else (weight.nested,)
    bnb_kernel.verify(cases.one_hot(range(width), width, bnb_kernel.dtype), *weight.quantized, N, K, *rest)


@for_ops("gemm_4bit", "gemm_4bit_transposed")
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_each_weight_few_rows(bnb_kernel: KernelUnderTest, rows: int) -> None:
    N, K = 37, 67
    weight = cases.weight_4bit(N * K, 32)
    width = K if bnb_kernel.spec.name == "gemm_4bit" else N
    rest = (None, weight.nested) if bnb_kernel.spec.name == "gemm_4bit" else (weight.nested,)
    for start in range(0, width, rows):
        columns = range(start, min(start + rows, width))
        bnb_kernel.verify(cases.one_hot(columns, width, bnb_kernel.dtype), *weight.quantized, N, K, *rest)


@for_ops("gemm_4bit", "gemm_4bit_transposed")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("rows", [1, 20])
def test_extreme_scales(bnb_kernel: KernelUnderTest, rows: int, scale: float) -> None:
    N, K = 24, 100
    weight = cases.weight_4bit(N * K, 64, scale=scale)
    width = K if bnb_kernel.spec.name == "gemm_4bit" else N
    rest = (None, weight.nested) if bnb_kernel.spec.name == "gemm_4bit" else (weight.nested,)
    bnb_kernel.verify(cases.activations("normal", (rows, width), bnb_kernel.dtype), *weight.quantized, N, K, *rest)


@for_ops("gemm_4bit", "gemm_4bit_transposed")
@pytest.mark.parametrize("rows", [1, 20, 64])
def test_subnormal_activations(bnb_kernel: KernelUnderTest, rows: int) -> None:
    """Instructions for bfloat16 products take subnormal numbers for zero on many CPUs."""
    N, K = 24, 100
    weight = cases.weight_4bit(N * K, 64)
    width = K if bnb_kernel.spec.name == "gemm_4bit" else N
    rest = (None, weight.nested) if bnb_kernel.spec.name == "gemm_4bit" else (weight.nested,)
    x = cases.activations("normal", (rows, width), bnb_kernel.dtype) * (torch.finfo(bnb_kernel.dtype).tiny / 2)
    bnb_kernel.verify(x, *weight.quantized, N, K, *rest)


@for_ops("gemm_4bit", "gemm_4bit_transposed")
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_nan_and_infinity_in_one_row(bnb_kernel: KernelUnderTest, rows: int, special: float) -> None:
    N, K = 21, 67
    weight = cases.weight_4bit(N * K, 32)
    width = K if bnb_kernel.spec.name == "gemm_4bit" else N
    rest = (None, weight.nested) if bnb_kernel.spec.name == "gemm_4bit" else (weight.nested,)
    x = cases.activations("normal", (rows, width), bnb_kernel.dtype)
    x[rows // 2, width - 1] = special
    bnb_kernel.verify(x, *weight.quantized, N, K, *rest)


@for_ops("gemm_4bit", "gemm_4bit_transposed")
@pytest.mark.parametrize("special", [float("nan"), float("inf"), 0.0])
def test_special_scale_of_one_block(bnb_kernel: KernelUnderTest, special: float) -> None:
    N, K = 9, 67
    packed, absmax, codebook, blocksize = cases.weight_4bit(N * K, 32, "zeroless").quantized
    absmax[5] = special  # a block that straddles two rows
    width = K if bnb_kernel.spec.name == "gemm_4bit" else N
    rest = (None, None) if bnb_kernel.spec.name == "gemm_4bit" else (None,)
    x = cases.activations("normal", (3, width), bnb_kernel.dtype)
    bnb_kernel.verify(x, packed, absmax, codebook, blocksize, N, K, *rest)


@for_ops("gemm_4bit")
@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 0, 33), (2, 3, 33), (1, 1, 1, 33)], ids=str)
def test_gemm_4bit_shape(bnb_kernel: KernelUnderTest, shape: Tuple[int, ...]) -> None:
    weight = cases.weight_4bit(7 * 33, 32)
    x = cases.activations("normal", shape, bnb_kernel.dtype)
    bnb_kernel.verify(x, *weight.quantized, 7, 33, cases.bias(7, bnb_kernel.dtype), None)


@for_ops("grouped_gemm_4bit", "grouped_gemm_4bit_transposed")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        shape=((1, 1), (7, 33), (16, 64), (5, 97), (33, 127)),
        blocksize=BLOCKSIZES_4BIT,
        tokens=((0, 0, 0), (1,), (5, 0, 0, 3), (0, 17), (64, 1, 0), (1, 1, 1, 1, 1, 1)),
        values=("normal", "cancelling", "spiky"),
        codebook=("nf4", "unsorted"),
        nested_blocksize=(0, 256, 7),
    ),
    ids=str,
)
def test_grouped_gemm_4bit(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    N, K = case.shape
    experts = cases.weight_4bit(N * K, case.blocksize, case.codebook, case.nested_blocksize, experts=len(case.tokens))
    offsets = torch.tensor([0, *case.tokens]).cumsum(0).int()
    width = K if bnb_kernel.spec.name == "grouped_gemm_4bit" else N
    x = cases.activations(case.values, (sum(case.tokens), width), bnb_kernel.dtype)
    bnb_kernel.verify(x, *experts.quantized, offsets, N, K, experts.nested)


@for_ops("grouped_gemm_4bit", "grouped_gemm_4bit_transposed")
def test_each_weight_of_each_expert(bnb_kernel: KernelUnderTest) -> None:
    N, K, count = 5, 39, 3
    experts = cases.weight_4bit(N * K, 32, "nf4", 7, experts=count)
    width = K if bnb_kernel.spec.name == "grouped_gemm_4bit" else N
    offsets = (torch.arange(count + 1) * width).int()
    x = cases.one_hot([*range(width)] * count, width, bnb_kernel.dtype)
    bnb_kernel.verify(x, *experts.quantized, offsets, N, K, experts.nested)
