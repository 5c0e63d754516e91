"""LLM.int8: exact codes, exact integer products, and scaled products within their bound."""

from __future__ import annotations

from typing import Tuple

import pytest
import torch

from bnb_core.testing import cases
from bnb_core.testing.subject import KernelUnderTest, for_ops

MATRICES = ((1, 1), (1, 7), (5, 1), (3, 33), (17, 64), (2, 1031), (65, 130))


@for_ops("int8_quantize_rows", "int8_quantize_rows_cols")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(shape=(*MATRICES, (0, 5), (4, 0)), values=tuple(cases.INT8_KINDS), threshold=(0.0, 6.0, 0.5, 1e30)),
    ids=str,
)
def test_int8_quantize(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    bnb_kernel.verify(cases.int8_values(case.values, case.shape, bnb_kernel.dtype), case.threshold)


@for_ops("int8_matmul")
@pytest.mark.parametrize("M", [0, 1, 2, 3, 5, 17, 64])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 5), (33, 127), (16, 64), (5, 1031), (70, 300), (2, 0)])
def test_int8_matmul(bnb_kernel: KernelUnderTest, M: int, N: int, K: int) -> None:
    bnb_kernel.verify(cases.int8_codes((M, K), -128), cases.int8_codes((N, K), -128))


@for_ops("int8_matmul")
@pytest.mark.parametrize(("a", "b"), [(127, 127), (-128, -128), (-128, 127), (127, -127)])
@pytest.mark.parametrize("M", [1, 9])
def test_int8_matmul_does_not_saturate_or_round(bnb_kernel: KernelUnderTest, M: int, a: int, b: int) -> None:
    """Sums of two products pass 2^15, and the whole sum 2^24; it is odd where it can be."""
    columns = 65537
    left, right = (torch.full((rows, columns), value, dtype=torch.int8) for rows, value in ((M, a), (3, b)))
    left[:, columns // 2] = 1
    bnb_kernel.verify(left, right)


@for_ops("int8_matmul_dequant")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        shape=((0, 3), (1, 1), (1, 7), (3, 33), (17, 64), (65, 130)),
        magnitude=(1, 1000, 2**31 - 1),
        bias=(False, True),
        scale=(1.0, 1e-15, 1e12),
    ),
    ids=str,
)
def test_int8_matmul_dequant(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    M, N = case.shape
    product = cases.integers((M, N), case.magnitude)
    bias = cases.bias(N, bnb_kernel.dtype) if case.bias else None
    bnb_kernel.verify(product, cases.scales(M) * case.scale, cases.scales(N), bias, bnb_kernel.dtype)


@for_ops("int8_dequantize_rows")
@pytest.mark.parametrize("case", cases.pairwise(shape=(*MATRICES, (0, 5), (4, 0)), absmax=tuple(cases.ABSMAX)), ids=str)
def test_int8_dequantize_rows(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    bnb_kernel.verify(cases.int8_codes(case.shape, -128), cases.absmax(case.absmax, case.shape[0]), bnb_kernel.dtype)


@for_ops("int8_linear")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        weight=((1, 1), (3, 5), (7, 33), (16, 64), (33, 127), (5, 1031), (70, 130)),
        rows=(0, 1, 2, 3, 5, 17, 64),
        values=("normal", "outliers", "zero rows", "halves"),
        threshold=(0.0, 6.0, 0.5),
        bias=(False, True),
    ),
    ids=str,
)
def test_int8_linear(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    N, K = case.weight
    x = cases.int8_values(case.values, (case.rows, K), bnb_kernel.dtype)
    bias = cases.bias(N, bnb_kernel.dtype) if case.bias else None
    bnb_kernel.verify(x, cases.int8_codes((N, K)), cases.scales(N), bias, case.threshold)


@for_ops("int8_linear")
@pytest.mark.parametrize("threshold", [0.0, 1000.0])
@pytest.mark.parametrize("rows", [1, 20])
def test_int8_linear_rounds_halves_to_even(bnb_kernel: KernelUnderTest, rows: int, threshold: float) -> None:
    """The second column's code is alone in the first two outputs."""
    x = torch.full((rows, 2), 127.0)
    x[:, 1] = torch.arange(rows) + 0.5
    codes = torch.tensor([[0, 127], [0, 1], [1, 0]], dtype=torch.int8)
    bnb_kernel.verify(x.to(bnb_kernel.dtype), codes, cases.scales(3), None, threshold)


@for_ops("int8_linear_transposed")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        weight=((1, 1), (3, 5), (7, 33), (16, 64), (127, 33), (1031, 5), (70, 130)),
        rows=(0, 1, 2, 3, 5, 17, 64),
        values=("normal", "positive", "cancelling", "spiky"),
    ),
    ids=str,
)
def test_int8_linear_transposed(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    N, K = case.weight
    g = cases.activations(case.values, (case.rows, N), bnb_kernel.dtype)
    bnb_kernel.verify(g, cases.int8_codes((N, K)), cases.scales(N))


@for_ops("int8_linear_transposed")
def test_each_int8_weight(bnb_kernel: KernelUnderTest) -> None:
    N, K = 9, 130
    bnb_kernel.verify(cases.one_hot(range(N), N, bnb_kernel.dtype), cases.int8_codes((N, K)), cases.scales(N))


@for_ops("int8_linear", "int8_linear_transposed")
@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 3, 33), (1, 1, 1, 33)], ids=str)
def test_int8_linear_shape(bnb_kernel: KernelUnderTest, shape: Tuple[int, ...]) -> None:
    x = cases.activations("normal", shape, bnb_kernel.dtype)
    if bnb_kernel.spec.name == "int8_linear":
        bnb_kernel.verify(x, cases.int8_codes((7, 33)), cases.scales(7), cases.bias(7, bnb_kernel.dtype), 0.0)
    else:
        bnb_kernel.verify(x, cases.int8_codes((33, 7)), cases.scales(33))
