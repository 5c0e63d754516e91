"""Comparisons: what is within a bound passes, what is just outside fails and is named."""

import numpy as np
import pytest
import torch

from bnb_core.testing import tolerances
from bnb_core.testing.oracle import Product
from bnb_core.testing.rounding import Rounded

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [([1.0, -0.0], [1.0, -0.0]), ([NAN, INF], [-NAN, INF]), ([], [])],
)
def test_identical(actual, expected):
    tolerances.assert_identical(torch.tensor(actual), torch.tensor(expected), "x")


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0000002], "x: 1 of 2 elements differ; the first is element 1: 2.0, expected 2.000000238418579"),
        ([0.0], [-0.0], "element 0: 0.0, expected -0.0"),
        ([NAN], [1.0], "element 0: nan, expected 1.0"),
        ([1.0], [1.0, 1.0], r"x has shape \[1\], expected \[2\]"),
    ],
)
def test_not_identical(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        tolerances.assert_identical(torch.tensor(actual), torch.tensor(expected), "x")


def test_not_identical_in_dtype():
    with pytest.raises(AssertionError, match=r"x is torch\.float16, expected torch.float32"):
        tolerances.assert_identical(torch.zeros(1).half(), torch.zeros(1), "x")


def product(y, magnitude, terms=1):
    return Product(np.array([y]), np.array([magnitude]), terms)


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 2.0**-24), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)], ids=str
)
def test_product_bound_is_that_of_the_contract(dtype, unit):
    bound = tolerances.product_bound(product(3.0, 10.0, terms=100), dtype).item()
    assert bound == pytest.approx(unit * 3 + (unit + 100 * 2.0**-24) * 10, rel=1e-4)


def test_product_just_inside_and_just_outside():
    expected = product(1.0, 1.0, terms=2)  # within (1 + 1 + 2) 2^-24
    tolerances.assert_product(torch.tensor([1 + 4 * 2.0**-24]), expected, "y")
    tolerances.assert_product(torch.tensor([1 - 4 * 2.0**-24]), expected, "y")
    for wrong in (1 + 6 * 2.0**-24, 1 - 5 * 2.0**-24, NAN, INF):
        with pytest.raises(AssertionError, match="y: 1 of 1 elements are outside their bound; the worst is element 0"):
            tolerances.assert_product(torch.tensor([wrong]), expected, "y")


@pytest.mark.parametrize(("y", "right", "wrong"), [(NAN, NAN, 1.0), (INF, INF, 65504.0), (-INF, -INF, INF), (1e6, INF, 65504.0)])
def test_product_that_is_not_finite(y, right, wrong):
    tolerances.assert_product(torch.tensor([right]).half(), product(y, abs(y)), "y")
    with pytest.raises(AssertionError):
        tolerances.assert_product(torch.tensor([wrong]).half(), product(y, abs(y)), "y")


def test_product_may_round_to_a_subnormal_number():
    tolerances.assert_product(torch.tensor([0.0]).half(), product(2.0**-26, 2.0**-26), "y")
    tolerances.assert_product(torch.tensor([2.0**-24]).half(), product(2.0**-25, 2.0**-25), "y")
    with pytest.raises(AssertionError):
        tolerances.assert_product(torch.tensor([0.0]).half(), product(2.0**-24, 2.0**-24), "y")


def test_rounded_once():
    value = Rounded(np.array([1 + 2.0**-8]), np.array([2.0**-20]))  # halfway between two bfloat16 numbers, give or take
    for right in (1.0, 1 + 2.0**-7):
        tolerances.assert_rounded(torch.tensor([right]).bfloat16(), value, "p")
    exact = Rounded.exact(np.array([1 + 2.0**-8 + 2.0**-9]))
    tolerances.assert_rounded(torch.tensor([1 + 2.0**-7]).bfloat16(), exact, "p")
    with pytest.raises(AssertionError, match=r"p: 1 of 1 elements are wrong; the first is element 0: 1.0, expected 1.0078125"):
        tolerances.assert_rounded(torch.tensor([1.0]).bfloat16(), exact, "p")


CODEBOOK = torch.tensor([0.0, 1.0, 0.5])  # ranks: codes 0, 2, 1


def quantized(codes, value, absmax=1.0, error=0.0):
    expected = Rounded(np.array([1.0, value]), np.array([0.0, error]))
    tolerances.assert_quantized(torch.tensor(codes), torch.tensor([absmax]), CODEBOOK, 2, expected, "m")


def test_state_codes():
    quantized([1, 2], 0.3)
    quantized([1, 0], 0.25)  # a tie
    quantized([1, 2], 0.25 - 1e-8)  # so near that float32 may see it on the other side
    quantized([1, 2], 0.2, error=0.1)
    with pytest.raises(AssertionError, match=r"m: 1 of 2 codes are wrong; the first is element 1: 0.5 stands for 0.2"):
        quantized([1, 2], 0.2)
    with pytest.raises(AssertionError, match=r"1\.0 stands for 0.25"):
        quantized([1, 1], 0.25, error=1.0)  # however uncertain: never two codes off


def test_state_absmax():
    with pytest.raises(AssertionError, match="absmax of m"):
        quantized([1, 2], 0.3, absmax=1.001)
