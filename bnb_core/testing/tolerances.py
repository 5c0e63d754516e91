"""The bounds of the contracts, and comparisons that say which element breaks them and by how much."""

from __future__ import annotations

import numpy as np
import torch

from bnb_core.ops.spec import ABSMAX_FLOOR
from bnb_core.testing.oracle import Product
from bnb_core.testing.rounding import Rounded

#: Largest relative error of rounding to a dtype.
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: Half the spacing of a dtype's subnormal numbers: the error that rounding tiny values cannot avoid.
SUBNORMAL_ROUNDOFF = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
#: How near to a midpoint, relative to its own size, an optimizer state may take the code on the midpoint's other side.
STATE_ROUNDOFF = 2.0**-20


def assert_identical(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Fail unless both tensors have the same bits, where any NaN equals any other.

    Raises:
        AssertionError: it counts the elements that differ, and shows the first.
    """
    assert actual.dtype == expected.dtype, f"{what} is {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not actual.numel():
        return
    actual, expected = actual.cpu().contiguous().view(-1), expected.cpu().contiguous().view(-1)
    different = (_bytes(actual) != _bytes(expected)).any(1)
    if actual.dtype.is_floating_point:
        different &= ~(actual.isnan() & expected.isnan())
    if different.any():
        first = int(different.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} elements differ; the first is element {first}: "
            f"{_show(actual[first])}, expected {_show(expected[first])}"
        )


def product_bound(product: Product, dtype: torch.dtype) -> np.ndarray:
    """Return how far each element of a product may be from its float64 value.

    u_out |y| + (u_op + 2^-24 K) sum |x| |w|, and what rounding to subnormal numbers of the dtype takes.
    """
    unit = UNIT_ROUNDOFF[dtype]
    relative = unit * np.abs(product.y) + (unit + 2.0**-24 * product.terms) * product.magnitude
    return relative + SUBNORMAL_ROUNDOFF[dtype] + product.terms * SUBNORMAL_ROUNDOFF[torch.float32]


@np.errstate(all="ignore")
def assert_product(actual: torch.Tensor, product: Product, what: str) -> None:
    """Fail unless each element is within its bound. NaN and infinities must be where float64 has them.

    Raises:
        AssertionError: it counts the elements that are not, and shows the one that is worst.
    """
    y, bound = product.y.reshape(-1), product_bound(product, actual.dtype).reshape(-1)
    got = as_numpy(actual).astype(np.float64).reshape(-1)
    assert got.shape == y.shape, f"{what} has {got.size} elements, expected {y.size}"
    low, high = _rounded_down(y - bound, actual.dtype), _rounded_up(y + bound, actual.dtype)
    fits = np.where(np.isfinite(y), (low <= got) & (got <= high), (got == y) | (np.isnan(got) & np.isnan(y)))
    if not fits.all():
        excess = np.where(fits, 0, np.nan_to_num(np.abs(got - y) / bound, nan=np.inf))
        worst = int(excess.argmax())
        raise AssertionError(
            f"{what}: {int((~fits).sum())} of {fits.size} elements are outside their bound; the worst is element {worst}: "
            f"{float(got[worst])!r}, expected {float(y[worst])!r} within {bound[worst]:.3g}"
        )


@np.errstate(all="ignore")
def assert_rounded(actual: torch.Tensor, expected: Rounded, what: str) -> None:
    """Fail unless each element is a number within the error bound, rounded once to the dtype.

    Raises:
        AssertionError: it counts the elements that are not, and shows the first.
    """
    value, error = expected.value.reshape(-1), np.broadcast_to(expected.error, expected.value.shape).reshape(-1)
    got = as_numpy(actual).astype(np.float64).reshape(-1)
    low, high = _rounded(value - error, actual.dtype), _rounded(value + error, actual.dtype)
    fits = (low <= got) & (got <= high)
    if not fits.all():
        first = int((~fits).argmax())
        raise AssertionError(
            f"{what}: {int((~fits).sum())} of {fits.size} elements are wrong; the first is element {first}: "
            f"{float(got[first])!r}, expected {float(low[first])!r} to {float(high[first])!r}"
        )


@np.errstate(all="ignore")
def assert_quantized(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, expected: Rounded, what: str
) -> None:
    """Fail unless codes and absmax are those of the expected state, or of one within its error.

    A code may be that of a neighbouring entry only where the state lies that near to the midpoint between them.

    Raises:
        AssertionError: it counts the elements that are wrong, and shows the first.
    """
    n = expected.value.size
    value = expected.value.reshape(-1)
    error = np.maximum(expected.error.reshape(-1), STATE_ROUNDOFF * np.abs(value))
    largest = _by_blocks(np.abs(value), blocksize)
    assert_rounded(absmax, Rounded(largest, _by_blocks(error, blocksize)), f"absmax of {what}")

    scale = 1 / np.maximum(as_numpy(absmax).astype(np.float64), ABSMAX_FLOOR)
    scale = np.repeat(scale, blocksize)[:n]
    entries = as_numpy(codebook)
    ranked = np.argsort(entries, kind="stable")
    rank_of_code = np.empty(len(entries), np.int64)
    rank_of_code[ranked] = np.arange(len(entries))
    midpoints = (entries[ranked][:-1] + entries[ranked][1:]) * np.float32(0.5)
    low, right, high = (
        np.searchsorted(midpoints.astype(np.float64), s, side="left")
        for s in ((value - error) * scale, value * scale, (value + error) * scale)
    )
    rank = rank_of_code[codes.cpu().numpy().reshape(-1)]
    fits = (low <= rank) & (rank <= high) & (np.abs(rank - right) <= 1)
    if not fits.all():
        first = int((~fits).argmax())
        raise AssertionError(
            f"{what}: {int((~fits).sum())} of {n} codes are wrong; the first is element {first}: "
            f"{float(entries[ranked][rank[first]])!r} stands for {float(value[first] * scale[first])!r}, "
            f"nearest is {float(entries[ranked][right[first]])!r}"
        )


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values in numpy; float16 and bfloat16 as float32, which holds them exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype.is_floating_point else tensor).numpy()


def as_torch(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Return an array as a CPU tensor: float32 values are rounded to nearest even if the dtype is narrower."""
    return torch.from_numpy(np.ascontiguousarray(values).reshape(values.shape)).to(dtype)


def _by_blocks(values: np.ndarray, blocksize: int) -> np.ndarray:
    blocks = -(-values.size // blocksize)
    padded = np.zeros(blocks * blocksize)
    padded[: values.size] = values
    return padded.reshape(blocks, blocksize).max(axis=1)


def _rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Round float64 values to a dtype once."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).double().numpy()


def _rounded_down(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return np.where(values < -torch.finfo(dtype).max, -np.inf, values)


def _rounded_up(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return np.where(values > torch.finfo(dtype).max, np.inf, values)


def _bytes(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8).view(flat.numel(), -1)


def _show(element: torch.Tensor) -> str:
    return repr(element.item())
