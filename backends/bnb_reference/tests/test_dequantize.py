"""Dequantization to the bit, against the definition spelled out in numpy."""

import numpy as np
import pytest
import torch

from bnb_core import ops
from bnb_core.ops import Nested


def rounded(values, dtype):
    """Round float32 to nearest even, by integer arithmetic for bfloat16."""
    if dtype == torch.float32:
        return torch.from_numpy(values)
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.astype(np.float16))
    bits = values.view(np.uint32).astype(np.int64)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    upper[np.isnan(values)] = 0x7FC0
    return torch.from_numpy(upper.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def expected(codes, absmax, codebook, blocksize, dtype):
    """Return codebook[code] * absmax, one float32 product and one rounding."""
    scales = absmax.numpy()[np.arange(len(codes)) // blocksize]
    with np.errstate(all="ignore"):
        values = codebook.numpy()[codes] * scales
    assert values.dtype == np.float32
    return rounded(values, dtype)


def unpack(packed):
    return np.array([code for byte in packed.tolist() for code in (byte >> 4, byte & 15)])


def same(a, b):
    """Compare to the bit, but for what distinguishes one NaN from another."""
    a, b = a.float().numpy().reshape(-1), b.float().numpy().reshape(-1)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a) & ~np.isnan(a), np.signbit(b) & ~np.isnan(b))


def random_nested(blocks, nested_blocksize):
    """Return quantized scales, what they are quantized with, and the scales, recovered with two roundings in numpy."""
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    nested = Nested(
        torch.rand(-(-blocks // nested_blocksize)) + 0.1, torch.rand(256) * 2 - 1, torch.tensor(0.7391234), nested_blocksize
    )
    product = nested.codebook.numpy()[absmax.numpy()] * nested.absmax.numpy()[np.arange(blocks) // nested_blocksize]
    return absmax, nested, torch.from_numpy(product + nested.offset.numpy())


@pytest.mark.parametrize("shape", [(1,), (2,), (31, 7), (3, 5, 32), (1, 999)])
@pytest.mark.parametrize("blocksize", [32, 256])
def test_4bit(shape, blocksize, codebooks, dtype, pieces):
    n = int(np.prod(shape))
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // blocksize)) * 3
    for codebook in codebooks.values():
        values = ops.dequantize_4bit(packed, absmax, codebook, blocksize, shape, dtype)
        assert values.shape == shape
        assert values.dtype == dtype
        same(values, expected(unpack(packed)[:n], absmax, codebook, blocksize, dtype))


def test_4bit_without_dimensions(nf4, dtype):
    value = ops.dequantize_4bit(torch.tensor([0xF0], dtype=torch.uint8), torch.tensor([2.0]), nf4, 64, (), dtype)
    assert value.shape == ()
    assert value == 2


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_4bit_blocksizes(blocksize, nf4, pieces):
    n = 2 * blocksize + 17
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(3)
    values = ops.dequantize_4bit(packed, absmax, nf4, blocksize, (n,), torch.float32)
    same(values, expected(unpack(packed)[:n], absmax, nf4, blocksize, torch.float32))


@pytest.mark.parametrize("nested_blocksize", [1, 7, 256])
@pytest.mark.parametrize("n", [33, 32 * 300 + 5])
def test_nested(n, nested_blocksize, nf4, dtype, pieces):
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax, nested, scales = random_nested(-(-n // 32), nested_blocksize)
    values = ops.dequantize_4bit(packed, absmax, nf4, 32, (n,), dtype, nested)
    same(values, expected(unpack(packed)[:n], scales, nf4, 32, dtype))


def test_nested_rounds_after_the_product_and_after_the_sum(nf4):
    blocks = 4096
    absmax, nested, scales = random_nested(blocks, 256)
    packed = torch.full((blocks * 16,), 0xFF, dtype=torch.uint8)  # code 15 is 1.0: the values are the scales
    values = ops.dequantize_4bit(packed, absmax, nf4, 32, (blocks, 32), torch.float32, nested)[:, 0]
    same(values, scales)
    product = nested.codebook.double()[absmax.long()] * nested.absmax.double().repeat_interleave(256)
    assert (values != (product + nested.offset.double()).float()).sum() > 100, "a fused multiply-add would give the same here"


@pytest.mark.parametrize("blocksize", [1, 3, 64, 100, 4096])
def test_blockwise(blocksize, dynamic, dtype, pieces):
    codes = torch.randint(0, 256, (7, 143), dtype=torch.uint8)
    absmax = torch.rand(-(-codes.numel() // blocksize)) * 5
    values = ops.dequantize_blockwise(codes, absmax, dynamic, blocksize, dtype)
    assert values.shape == codes.shape
    same(values, expected(codes.numpy().reshape(-1), absmax, dynamic, blocksize, dtype))


def test_more_elements_than_a_piece(nf4, dynamic):
    n = (1 << 19) * 2 + 77
    packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-n // 64))
    values = ops.dequantize_4bit(packed, absmax, nf4, 64, (n,), torch.bfloat16)
    same(values, expected(np.stack((packed >> 4, packed & 15), 1).reshape(-1)[:n], absmax, nf4, 64, torch.bfloat16))
    values = ops.dequantize_blockwise(packed, absmax[: -(-len(packed) // 128)], dynamic, 128, torch.float32)
    same(values, expected(packed.numpy(), absmax, dynamic, 128, torch.float32))


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), 1e-45, 3e-41, 2.0**-126, 3.4028234e38])
def test_special_scales(scale, nf4, dynamic, dtype):
    absmax = torch.tensor([1.0, scale, 1.0])
    packed = torch.arange(16 * 17, dtype=torch.int64).to(torch.uint8)[:40]
    values = ops.dequantize_4bit(packed, absmax, nf4, 32, (80,), dtype)
    same(values, expected(unpack(packed), absmax, nf4, 32, dtype))
    codes = torch.arange(256).to(torch.uint8).repeat(3)
    same(ops.dequantize_blockwise(codes, absmax, dynamic, 256, dtype), expected(codes.numpy(), absmax, dynamic, 256, dtype))


def test_what_is_quantized_comes_back_within_half_a_step(nf4, dynamic, dtype):
    x = torch.randn(64, 64).to(dtype)
    packed, absmax = ops.quantize_4bit(x, nf4, 64)
    widest = (nf4[1:] - nf4[:-1]).max() / 2
    restored = ops.dequantize_4bit(packed, absmax, nf4, 64, x.shape, torch.float32)
    assert ((restored - x.float()).abs() <= absmax[:, None] * (widest + 1e-6)).all()
    codes, absmax = ops.quantize_blockwise(x, dynamic, 64)
    widest = (dynamic[1:] - dynamic[:-1]).max() / 2
    restored = ops.dequantize_blockwise(codes, absmax, dynamic, 64, torch.float32)
    assert ((restored - x.float()).abs() <= absmax[:, None] * (widest + 1e-6)).all()


def test_reads_and_writes_at_any_address(nf4, dynamic):
    memory, results = torch.randint(0, 256, (700,), dtype=torch.uint8), torch.full((1300,), -9.0)
    packed, absmax, out = memory[3:503], torch.rand(18)[1:17], results[1:1001]
    ops.dequantize_4bit(packed, absmax, nf4, 64, (1000,), torch.float32, out=out)
    same(out, expected(unpack(packed), absmax, nf4, 64, torch.float32))
    assert set(results[:1].tolist() + results[1001:].tolist()) == {-9.0}
    ops.dequantize_blockwise(packed, absmax, dynamic, 32, torch.float32, out=results[3:503])
    same(results[3:503], expected(packed.numpy(), absmax, dynamic, 32, torch.float32))
