"""int8 ops: all tiers give the same bits, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from bnb_cpu_neon import engine
from bnb_cpu_neon.cpu import TIERS, this_cpu

from bnb_core import ops
from bnb_core.backends import use_backend


@pytest.fixture
def each_tier():
    """Set the tier by its name, and set it back afterwards."""
    with use_backend("neon"):
        ops.int8_matmul(*(torch.zeros(1, 1, dtype=torch.int8),) * 2)  # loads the native module
    before = engine.tier
    yield [(tier, TIERS.index(tier)) for tier in TIERS if not this_cpu().lacks(tier)]
    engine.native.set_tier(TIERS.index(before))


def _outputs(numbers, function):
    results = []
    for _, number in numbers:
        engine.native.set_tier(number)
        with use_backend("neon"):
            results.append(function())
    return results


@pytest.mark.parametrize("M", [1, 4, 5, 8, 13, 64, 200])
def test_tiers_agree_on_products(each_tier, M):
    torch.manual_seed(M)
    a, b = (torch.randint(-128, 128, (rows, 333), dtype=torch.int8) for rows in (M, 77))
    expected = (a.double() @ b.double().t()).int()
    for product in _outputs(each_tier, lambda: ops.int8_matmul(a, b)):
        assert torch.equal(product, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_tiers_agree_on_linear_layers(each_tier, dtype, threshold):
    torch.manual_seed(0)
    x = torch.randn(37, 190).to(dtype)
    codes = torch.randint(-127, 128, (45, 190), dtype=torch.int8)
    absmax, bias = torch.rand(45) + 0.5, torch.randn(45).to(dtype)
    first, *others = _outputs(each_tier, lambda: ops.int8_linear(x, codes, absmax, bias, threshold))
    for other in others:
        assert torch.equal(first, other)


def test_outlier_columns_are_multiplied_unquantized(each_tier):
    """A column far larger than the rest would cost these all their digits; the result is that of exact arithmetic."""
    x = torch.full((3, 40), 0.5)
    x[:, 7] = 1000.25
    codes = torch.full((9, 40), 127, dtype=torch.int8)
    absmax = torch.full((9,), 1.0)
    for y in _outputs(each_tier, lambda: ops.int8_linear(x, codes, absmax, None, 6.0)):
        torch.testing.assert_close(y, torch.full((3, 9), 1000.25 + 39 * 0.5), rtol=1e-6, atol=0)
