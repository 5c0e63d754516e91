"""Quantization to the bit, against the definition spelled out in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnb_core import ops

ANY_FLOAT32 = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
CODEBOOKS = ("nf4", "fp4", "shuffled", "repeated")


def expected(x, codebook, blocksize):
    """Return codes and absmax by the definition: float32 throughout, midpoints counted one by one."""
    x, codebook = x.float().numpy().reshape(-1), codebook.numpy()
    order = sorted(range(len(codebook)), key=lambda code: (codebook[code], code))
    entries = codebook[order]
    midpoints = (entries[:-1] + entries[1:]) * np.float32(0.5)
    assert midpoints.dtype == np.float32
    codes, absmax = [], []
    with np.errstate(all="ignore"):
        for start in range(0, len(x), blocksize):
            block = x[start : start + blocksize]
            largest = np.float32("nan") if np.isnan(block).any() else np.abs(block).max()
            scale = np.float32(1) / np.maximum(largest, np.float32(2.0**-126))
            s = block * scale
            s[np.isnan(s)] = 0
            codes += [order[rank] for rank in (midpoints[None, :] < s[:, None]).sum(1)]
            absmax.append(largest)
    return np.array(codes, np.uint8), np.array(absmax, np.float32)


def code_of_zero(codebook):
    return int(expected(torch.zeros(1), codebook, 1)[0][0])


def pack(codes, codebook):
    codes = [*codes, code_of_zero(codebook)] if len(codes) % 2 else list(codes)
    return [high * 16 + low for high, low in zip(codes[::2], codes[1::2])]


def check_4bit(x, codebook, blocksize):
    packed, absmax = ops.quantize_4bit(x, codebook, blocksize)
    codes, largest = expected(x, codebook, blocksize)
    assert packed.tolist() == pack(codes, codebook)
    np.testing.assert_array_equal(absmax.numpy(), largest)


def check_blockwise(x, codebook, blocksize):
    codes, absmax = ops.quantize_blockwise(x, codebook, blocksize)
    expected_codes, largest = expected(x, codebook, blocksize)
    np.testing.assert_array_equal(codes.numpy().reshape(-1), expected_codes)
    np.testing.assert_array_equal(absmax.numpy(), largest)


def spread(n, dtype):
    """Return values over many magnitudes, so that blocks differ, in a matrix where n allows."""
    values = torch.randn(n) * 10 ** (torch.rand(n) * 6 - 3)
    return values.to(dtype).view((3, -1) if n % 3 == 0 else (-1,))


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 255, 300])
def test_4bit(n, name, codebooks, dtype, pieces):
    check_4bit(spread(n, dtype), codebooks[name], 32)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_4bit_blocksizes(blocksize, nf4, dtype, pieces):
    check_4bit(spread(blocksize * 2 + 33, dtype), nf4, blocksize)


@pytest.mark.parametrize("blocksize", [1, 2, 3, 50, 64, 100, 256, 5000])
def test_blockwise_blocksizes(blocksize, dynamic, dtype, pieces):
    check_blockwise(spread(999, dtype), dynamic, blocksize)


def test_blockwise_codebook_in_no_order_with_repeats(dtype):
    codebook = torch.randn(256)
    codebook[100:120] = codebook[200:220]
    check_blockwise(spread(5000, dtype), codebook, 256)


def test_more_elements_than_a_piece(nf4, dynamic):
    x = spread((1 << 19) * 2 + 101, torch.float32)
    check_4bit(x, nf4, 64)
    check_blockwise(x[: (1 << 19) + 77], dynamic, 100)


SPECIAL = {
    "nan": [1.0, float("nan"), -2.0, 0.5],
    "inf": [1.0, float("inf"), -2.0, 0.5],
    "-inf": [1.0, float("-inf"), -2.0, 0.5],
    "inf and nan": [float("inf"), float("nan"), 3.0, 0.0],
    "zeros": [0.0, -0.0, 0.0, -0.0],
    "subnormal": [1e-40, -3e-41, 1e-45, 0.0],
    "smallest normal": [2.0**-126, -(2.0**-127), 2.0**-149, 2.0**-128],
    "largest": [3.4028234e38, -1.7e38, 1e38, 1.0],
    "subnormal scale": [2.0**127, 2.0**126, -(2.0**125), 2.0**120],
}


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("case", SPECIAL)
def test_special_values_stay_in_their_block(case, name, codebooks, dynamic):
    x = torch.randn(7, 32)
    x[2, 5:9] = torch.tensor(SPECIAL[case])
    x[4] = torch.tensor(SPECIAL[case]).repeat(8)
    x[6, -4:] = torch.tensor(SPECIAL[case])
    check_4bit(x.view(-1)[:-1], codebooks[name], 32)  # the last block is shorter, and n odd
    check_blockwise(x.view(-1)[:-1], dynamic, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number(dtype, nf4, dynamic):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    check_4bit(every, nf4, 64)
    check_blockwise(every, dynamic, 1)


def test_what_nan_and_zero_blocks_become(nf4):
    x = torch.ones(96)
    x[40] = float("nan")
    x[64:] = 0
    packed, absmax = ops.quantize_4bit(x, nf4, 32)
    assert packed.tolist() == [0xFF] * 16 + [0x77] * 32
    assert absmax[0] == 1
    assert absmax[1].isnan()
    assert absmax[2] == 0


def test_ties_go_to_the_lower_entry():
    # Halves between integers over 8 are exact, so each s is a midpoint to the bit.
    codebook = torch.arange(-8, 8) / 8.0
    x = torch.cat((torch.tensor([-1.0]), (torch.arange(-8, 7) + 0.5) / 8))
    for values in (codebook, codebook.flip(0)):
        packed, _ = ops.quantize_4bit(x.repeat(2), values, 32)
        chosen = values[torch.stack((packed >> 4, packed & 15), 1).view(-1).long()][1:16]
        assert chosen.tolist() == codebook[:15].tolist()


def test_one_ulp_decides_next_to_a_midpoint(nf4, dynamic):
    for codebook, check in ((nf4, lambda x, c: check_4bit(x, c, 1024)), (dynamic, lambda x, c: check_blockwise(x, c, 1024))):
        values = codebook.sort()[0]
        midpoints = (values[:-1] + values[1:]) * 0.5
        up, down = torch.full_like(midpoints, 2.0), torch.full_like(midpoints, -2.0)
        near = torch.cat((torch.ones(1), midpoints, torch.nextafter(midpoints, up), torch.nextafter(midpoints, down)))
        check(near, codebook)


def test_the_scale_is_a_correctly_rounded_quotient():
    # 1 / absmax by an approximate reciprocal, or x / absmax instead of x * (1 / absmax), gives other codes for some of these.
    codebook = torch.linspace(-1, 1, 256)
    check_blockwise(torch.rand(40000) + 0.5, codebook, 2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(ANY_FLOAT32, min_size=1, max_size=70), table=st.lists(st.floats(-4, 4, width=32), min_size=16, max_size=16))
def test_4bit_any_values_and_codebook(values, table):
    check_4bit(torch.tensor(values), torch.tensor(table), 32)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(ANY_FLOAT32, min_size=1, max_size=40), blocksize=st.integers(1, 50))
def test_blockwise_any_values_and_blocksize(values, blocksize, dynamic):
    check_blockwise(torch.tensor(values), dynamic, blocksize)


def test_same_bytes_for_any_number_of_threads_and_alignment(nf4, dynamic):
    base = torch.randn(200_003)
    results = []
    threads = torch.get_num_threads()
    try:
        for count, offset in ((1, 0), (2, 1), (3, 2), (4, 3)):
            torch.set_num_threads(count)
            memory = torch.empty(len(base) + offset)
            x = memory[offset:].copy_(base)
            assert x.data_ptr() % 16 == (memory.data_ptr() + 4 * offset) % 16
            results.append([t.clone() for t in (*ops.quantize_4bit(x, nf4, 64), *ops.quantize_blockwise(x, dynamic, 77))])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result))


def test_fills_out_at_odd_addresses_and_nothing_beside_it(nf4):
    x = torch.randn(333)
    memory, scales = torch.full((200,), 0xAB, dtype=torch.uint8), torch.full((10,), -7.0)
    packed, absmax = memory[5 : 5 + 167], scales[1:7]
    ops.quantize_4bit(x, nf4, 64, out=(packed, absmax))
    codes, largest = expected(x, nf4, 64)
    assert packed.tolist() == pack(codes, nf4)
    np.testing.assert_array_equal(absmax.numpy(), largest)
    assert set(memory[:5].tolist() + memory[172:].tolist()) == {0xAB}
    assert set(scales[:1].tolist() + scales[7:].tolist()) == {-7.0}


def test_leaves_its_inputs_alone(nf4, dynamic):
    x = torch.tensor([1.0, float("nan"), float("inf"), -0.0] * 20)
    before, table = x.clone(), nf4.clone()
    ops.quantize_4bit(x, nf4, 64)
    ops.quantize_blockwise(x, dynamic, 64)
    np.testing.assert_array_equal(x.numpy(), before.numpy())
    assert torch.equal(nf4, table)
