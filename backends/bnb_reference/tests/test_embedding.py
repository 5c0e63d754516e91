"""Embedding rows, against the whole table dequantized."""

import numpy as np
import pytest
import torch

from bnb_core import ops
from bnb_core.ops import Nested


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("rows", "dim", "blocksize"),
    [(10, 64, 64), (11, 33, 32), (7, 1, 32), (5, 300, 128), (3, 31, 4096), (6, 500, 64), (4, 6, 32), (3, 256, 64)],
)
def test_4bit(rows, dim, blocksize, nested, index_dtype, nf4, dtype, pieces):
    table = torch.randn(rows, dim)
    packed, absmax = ops.quantize_4bit(table, nf4, blocksize)
    statistics = None
    if nested:
        codebook = torch.linspace(-1, 1, 256)
        statistics = Nested(torch.rand(-(-len(absmax) // 2)), codebook, torch.tensor(0.3), 2)
        absmax = torch.randint(0, 256, absmax.shape, dtype=torch.uint8)
    indices = torch.tensor([[0, rows - 1, rows // 2], [1, 1, 0]], dtype=index_dtype)
    values = ops.embedding_4bit(indices, packed, absmax, nf4, blocksize, rows, dim, dtype, statistics)
    whole = ops.dequantize_4bit(packed, absmax, nf4, blocksize, (rows, dim), dtype, statistics)
    assert values.shape == (2, 3, dim)
    assert torch.equal(values, whole[indices.long()])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_8bit(index_dtype, dtype, pieces):
    codes = torch.randint(-128, 128, (20, 37), dtype=torch.int8)
    absmax = torch.rand(20) * 10 ** (torch.rand(20) * 4 - 2)
    indices = torch.tensor([19, 0, 3, 3, 7], dtype=index_dtype)
    values = ops.embedding_8bit(indices, codes, absmax, dtype)
    scales = absmax.numpy() * np.float32(1 / 127)
    expected = torch.from_numpy(codes.numpy()[indices].astype(np.float32) * scales[indices][:, None])
    assert torch.equal(values, expected.to(dtype))


def test_one_index_without_dimensions(nf4):
    packed, absmax = ops.quantize_4bit(torch.randn(4, 6), nf4, 32)
    row = ops.embedding_4bit(torch.tensor(2), packed, absmax, nf4, 32, 4, 6, torch.float32)
    assert torch.equal(row, ops.dequantize_4bit(packed, absmax, nf4, 32, (4, 6), torch.float32)[2])
