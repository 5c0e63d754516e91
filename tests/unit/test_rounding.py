"""Numbers that carry the error of float32 arithmetic: the error covers what float32 does, and not much more."""

import numpy as np
import pytest

from bnb_core.testing.rounding import UNIT, Rounded


def inputs(seed):
    rng = np.random.default_rng(seed)
    return [np.float32(rng.standard_normal(1000) * scale) for scale in (1.0, 0.3, 2.0)]


FORMULAS = {
    "sum": lambda a, b, c: a + b + c,
    "difference of equals": lambda a, b, c: a * b - b * a + c,
    "product": lambda a, b, c: a * b * c,
    "quotient": lambda a, b, c: a / (b * b + 0.5),
    "root": lambda a, b, c: (a * a + b * b).sqrt() if isinstance(a, Rounded) else np.sqrt(a * a + b * b),
    "constants": lambda a, b, c: a * 0.9 + b * 0.1,
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_float32_stays_within_the_error(formula):
    arrays = inputs(1)
    exact = FORMULAS[formula](*map(Rounded.exact, arrays))
    with np.errstate(all="ignore"):
        single = FORMULAS[formula](*arrays).astype(np.float32)
    assert (np.abs(single - exact.value) <= exact.error).all()


@pytest.mark.parametrize("formula", ["product", "quotient", "root"])
def test_error_is_a_few_units_where_float32_is_good(formula):
    exact = FORMULAS[formula](*map(Rounded.exact, inputs(2)))
    assert (exact.error <= 8 * UNIT * np.abs(exact.value) + 1e-40).all()


def test_a_result_that_is_certain_has_no_error():
    zero = Rounded.exact(np.zeros(3))
    assert ((zero * 0.9 + zero * 0.1).error == 0).all()


def test_sign_is_uncertain_only_within_the_error():
    values = Rounded(np.array([1.0, -1.0, 0.0, 1e-9]), np.array([0.1, 0.1, 0.0, 1e-8]))
    assert values.sign().value.tolist() == [1.0, -1.0, 0.0, 1.0]
    assert values.sign().error.tolist() == [0.0, 0.0, 0.0, 2.0]


def test_division_by_what_may_be_zero_has_no_bound():
    assert np.isinf((Rounded.exact(np.ones(1)) / Rounded(np.array([1e-9]), np.array([1e-8]))).error)


def test_norm():
    norm = Rounded.exact(np.array([3.0, 4.0])).norm()
    assert norm.value == 5.0
    assert 0 < norm.error < 1e-5


def test_where_takes_value_and_error():
    mixed = (Rounded.exact(np.ones(2)) * 0.3).where(np.array([True, False]), np.array([7.0, 8.0]))
    assert mixed.value.tolist() == [0.3, 8.0]
    assert mixed.error[0] > 0
    assert mixed.error[1] == 0
