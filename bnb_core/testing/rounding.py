"""Float64 numbers that carry the error which float32 arithmetic may have made: running error analysis.

An expression written with `Rounded` numbers gives its exact value, and how far any float32 evaluation of it may be from that:
each operation passes on the errors of its operands and adds its own rounding (N. Higham, Accuracy and Stability of Numerical
Algorithms, section 3.3). So a bound follows the data: it is wide only where float32 is bad at it, as in a difference of equals.
"""

from __future__ import annotations

from typing import Union

import numpy as np

#: What one operation may add, relative to its result: four roundings of float32, so that an implementation may order the same
#: operations otherwise, multiply by a rounded reciprocal, or compute a constant in two steps.
UNIT = 4 * 2.0**-24
#: What one operation may add at least: float32 has nothing finer than its subnormal numbers.
TINY = 2.0**-148

Operand = Union["Rounded", float, np.ndarray]


class Rounded:
    """An array of exact values, with a bound on the error of the float32 numbers that stand for them."""

    __array_ufunc__ = None  # so that `array * rounded` comes here

    def __init__(self, value: np.ndarray, error: np.ndarray) -> None:
        self.value = value
        self.error = error

    @classmethod
    def exact(cls, value: Union[float, np.ndarray]) -> "Rounded":
        """Take values that float32 holds exactly."""
        value = np.asarray(value, np.float64)
        return cls(value, np.zeros_like(value))

    @classmethod
    def constant(cls, value: float) -> "Rounded":
        """Take a number that was computed in float64 and rounded."""
        return cls._rounded(np.asarray(value, np.float64), np.asarray(0.0))

    @classmethod
    def _rounded(cls, value: np.ndarray, error: np.ndarray) -> "Rounded":
        own = np.where((value == 0) & (error == 0), 0.0, UNIT * (np.abs(value) + error) + TINY)
        return cls(value, error + own)

    def __add__(self, other: Operand) -> "Rounded":
        other = _operand(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Operand) -> "Rounded":
        other = _operand(other)
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Operand) -> "Rounded":
        other = _operand(other)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Operand) -> "Rounded":
        other = _operand(other)
        value = self.value / other.value
        smallest = np.abs(other.value) - other.error
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.where(smallest > 0, (self.error + np.abs(value) * other.error) / smallest, np.inf)
        return self._rounded(value, error)

    __radd__ = __add__
    __rmul__ = __mul__

    def sqrt(self) -> "Rounded":
        """Return the square root of values that are not negative."""
        root = np.sqrt(self.value)
        low, high = np.sqrt(np.maximum(self.value - self.error, 0)), np.sqrt(self.value + self.error)
        return self._rounded(root, np.maximum(root - low, high - root))

    def sign(self) -> "Rounded":
        """Return -1, 0 or 1; where the sign is not certain, the error is 2."""
        return Rounded(np.sign(self.value), np.where(np.abs(self.value) < self.error, 2.0, 0.0))

    def maximum(self, other: Operand) -> "Rounded":
        """Return the larger of two values."""
        other = _operand(other)
        return Rounded(np.maximum(self.value, other.value), np.maximum(self.error, other.error))

    def where(self, condition: np.ndarray, other: Operand) -> "Rounded":
        """Return these values where the condition holds, and those of `other` elsewhere."""
        other = _operand(other)
        return Rounded(np.where(condition, self.value, other.value), np.where(condition, self.error, other.error))

    def norm(self) -> "Rounded":
        """Return the L2 norm of all values; the sum of squares may be taken in any order."""
        squares = self * self
        total = squares.value.sum()
        return Rounded(np.asarray(total), np.asarray(squares.error.sum() + total * self.value.size * 2.0**-24)).sqrt()


def _operand(value: Operand) -> Rounded:
    if isinstance(value, Rounded):
        return value
    return Rounded.constant(value) if isinstance(value, float) else Rounded.exact(value)
