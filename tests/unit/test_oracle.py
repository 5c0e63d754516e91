"""The oracle itself, on values worked out by hand."""

import numpy as np
import pytest

from bnb_core.testing import oracle

F32 = np.float32
GRID = (np.arange(16, dtype=F32) - 7) / 8  # -7/8 to 1; code 7 is zero


def f32(*values):
    return np.array(values, F32)


def test_nearest_code_goes_by_rank_and_ties_to_the_lower():
    codebook = f32(1.0, -1.0, 0.0, 0.5)  # in rank: codes 1, 2, 3, 0
    s = f32(-1.0, -0.5, -0.499, 0.25, 0.2501, 0.75, 0.7501, np.nan, np.inf)
    assert oracle.nearest_codes(s, codebook).tolist() == [1, 1, 2, 2, 3, 3, 0, 2, 0]


def test_equal_entries_rank_by_code():
    codebook = f32(0.5, 0.0, 0.5, 0.0)  # in rank: codes 1, 3, 0, 2; midpoints 0, 0.25, 0.5
    assert oracle.nearest_codes(f32(0.0, 0.1, 0.3, 0.5, 0.6), codebook).tolist() == [1, 3, 0, 0, 2]


def test_quantize_by_blocks_and_pack():
    x = f32(2.0, -1.0, 0.25, 0.5, 0.25)  # blocks of 3 and 2; the last shorter
    codes, absmax = oracle.quantize_blockwise(x, GRID, 3)
    assert absmax.tolist() == [2.0, 0.5]
    assert codes.tolist() == [15, 3, 8, 15, 11]
    packed, _ = oracle.quantize_4bit(x, GRID, 3)
    assert packed.tolist() == [0xF3, 0x8F, 0xB7]  # a nibble left over has the code of 0
    assert oracle.unpack(packed, 5).tolist() == codes.tolist()


def test_quantize_special_blocks():
    x = f32(0.0, -0.0, 1.0, np.nan, 1.0, np.inf, 2.0**-140, 2.0**-141)
    codes, absmax = oracle.quantize_blockwise(x, GRID, 2)
    np.testing.assert_array_equal(absmax, f32(0.0, np.nan, np.inf, 2.0**-140))
    assert not np.signbit(absmax[0])
    # NaN in a block: all of it takes the code of 0. Infinity: 1 / inf is 0, and inf * 0 is NaN. Tiny: scaled by 2^126 only.
    assert codes.tolist() == [7] * 8


def test_absmax_is_divided_by_only_down_to_the_smallest_normal_number():
    codes, _ = oracle.quantize_blockwise(f32(2.0**-127, 2.0**-128), GRID, 2)
    assert codes.tolist() == [11, 9]  # 0.5 and 0.25


def test_nested_scales_are_rounded_twice():
    scale, entry, offset = F32(1 + 2**-23), F32(1 + 2**-23), F32(-1)
    recovered = oracle.nested_absmax(np.zeros(1, np.uint8), f32(scale), f32(entry), offset, 256)
    assert recovered[0] == F32(2.0**-22)  # rounded once it would be 2^-22 + 2^-46
    assert np.float64(scale) * np.float64(entry) - 1 == 2.0**-22 + 2.0**-46


def test_nested_scales_by_groups():
    recovered = oracle.nested_absmax(np.array([0, 1, 1], np.uint8), f32(2.0, 3.0), f32(1.0, 10.0), F32(0.5), 2)
    assert recovered.tolist() == [2.5, 20.5, 30.5]


def test_product_and_its_magnitude():
    product = oracle.product(f32([1, -2]), f32([3, 4], [5, -6]), f32(0.5, 0.25))
    assert product.y.tolist() == [[-4.5, 17.25]]
    assert product.magnitude.tolist() == [[11.0, 17.0]]
    assert product.terms == 2


def test_grouped_product_gives_each_token_its_expert():
    experts = f32([[1.0]], [[10.0]], [[100.0]])
    product = oracle.grouped_product(f32([1], [2], [3]), experts, np.array([0, 1, 1, 3]))
    assert product.y.ravel().tolist() == [1.0, 200.0, 300.0]


def test_int8_rows_without_outliers():
    codes, absmax, mask = oracle.int8_quantize_rows(f32([127, -0.5, 1.5, 2.5], [0, 0, 0, 0]), 0.0)
    assert codes.tolist() == [[127, 0, 2, 2], [0, 0, 0, 0]]
    assert absmax.tolist() == [127.0, 0.0]
    assert not mask.any()


def test_int8_outliers_leave_the_row_and_their_column():
    x = f32([1, 6, -2], [3, 1, -5.5])
    row_codes, row_absmax, col_codes, col_absmax, mask = oracle.int8_quantize_rows_cols(x, 6.0)
    assert mask.tolist() == [False, True, False]
    assert row_absmax.tolist() == [2.0, 5.5]
    assert row_codes.tolist() == [[64, 0, -127], [69, 0, -127]]  # 63.5 goes to the even neighbour
    assert col_absmax.tolist() == [3.0, 1.0, 5.5]
    assert col_codes.tolist() == [[42, 0, -46], [127, 127, -127]]


@pytest.mark.parametrize(("threshold", "absmax"), [(0.0, [np.nan]), (6.0, [2.0])])
def test_int8_codes_of_nan_are_zero(threshold, absmax):
    codes, found, mask = oracle.int8_quantize_rows(f32([np.nan, 2.0]), threshold)
    np.testing.assert_array_equal(found, f32(*absmax))
    assert codes.tolist() == [[0, 0 if threshold == 0 else 127]]
    assert not mask.any()


def test_int8_matmul_is_exact_beyond_float32():
    a, b = np.full((1, 65537), 127, np.int8), np.full((1, 65537), 127, np.int8)
    assert oracle.int8_matmul(a, b).item() == 127 * 127 * 65537


def test_int8_linear_adds_outliers_to_the_scaled_product():
    x, codes, absmax = f32([1, 60, -2]), np.array([[127, 127, 0], [0, 1, 127]], np.int8), f32(2.0, 4.0)
    product = oracle.int8_linear(x, codes, absmax, f32(0.5, 0.0), 6.0)
    # x is 64/127 * 2, an outlier of 60, and -2; the weights are [2, 2, 0] and [0, 4/127, 4].
    np.testing.assert_allclose(product.y, [[64 / 127 * 2 * 2 + 120 + 0.5, 60 * 4 / 127 - 8]], rtol=1e-7)
