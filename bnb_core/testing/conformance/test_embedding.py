"""Tables of quantized rows: the rows that are asked for, to the bit."""

from __future__ import annotations

import pytest
import torch

from bnb_core.ops.spec import BLOCKSIZES_4BIT
from bnb_core.testing import cases
from bnb_core.testing.subject import KernelUnderTest, for_ops


def _indices(kind: str, rows: int) -> torch.Tensor:
    return {
        "every row, backwards": torch.arange(rows).flip(0),
        "one row, often": torch.full((300,), rows - 1),
        "matrix": (torch.arange(6) * 7 % rows).view(2, 3),
        "number": torch.tensor(rows // 2),
        "none": torch.empty(0, dtype=torch.int64),
    }[kind]


INDICES = ("every row, backwards", "one row, often", "matrix", "number", "none")


@for_ops("embedding_4bit")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        table=((1, 1), (3, 5), (9, 33), (20, 64), (5, 97), (3, 1031)),
        blocksize=BLOCKSIZES_4BIT,
        indices=INDICES,
        index_dtype=(torch.int32, torch.int64),
        codebook=("nf4", "unsorted"),
        nested_blocksize=(0, 256, 7),
    ),
    ids=str,
)
def test_embedding_4bit(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    rows, width = case.table
    weight = cases.weight_4bit(rows * width, case.blocksize, case.codebook, case.nested_blocksize)
    indices = _indices(case.indices, rows).to(case.index_dtype)
    bnb_kernel.verify(indices, *weight.quantized, rows, width, bnb_kernel.dtype, weight.nested)


@for_ops("embedding_8bit")
@pytest.mark.parametrize(
    "case",
    cases.pairwise(
        table=((1, 1), (3, 5), (9, 33), (20, 64), (5, 97), (3, 1031)),
        indices=INDICES,
        index_dtype=(torch.int32, torch.int64),
        absmax=tuple(cases.ABSMAX),
    ),
    ids=str,
)
def test_embedding_8bit(bnb_kernel: KernelUnderTest, case: cases.Case) -> None:
    rows, width = case.table
    indices = _indices(case.indices, rows).to(case.index_dtype)
    bnb_kernel.verify(indices, cases.int8_codes((rows, width)), cases.absmax(case.absmax, rows), bnb_kernel.dtype)
