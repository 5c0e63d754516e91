"""The tables of values that codes stand for: how each is built, and how one is found by name.

Values are computed with numpy or in pure Python, not with torch: `torch.linspace` rounds differently on different CPUs, and a
codebook has to be the same everywhere.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Dict, List, Optional, Tuple, Union

import numpy as np
import torch

from bnb_core.backends.discovery import registry
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import ordinary_execution

Device = Union[torch.device, str, int, None]


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Build a codebook of evenly spaced values.

    Args:
        signed: from -1 to 1; otherwise from 0 to 1.
        total_bits: 2 to 8; 2^total_bits values, one fewer if signed and zero is to be among them.
        add_zero: have 0 among the values, which takes an odd number of them. Always so below 8 bits, where zeros fill the table.

    Returns:
        float32 [256], ascending; zeros are put in the middle where there are fewer values.

    Raises:
        InvalidArgumentError: total_bits is not accepted.
    """
    _require_bits("create_linear_map", total_bits)
    count = 2**total_bits - (1 if signed and (add_zero or total_bits < 8) else 0)
    values = _spaced(-1.0 if signed else 0.0, 1.0, count)
    half = count // 2
    return _tensor(values[:half].tolist() + [0.0] * (256 - count) + values[half:].tolist())


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Build the NormalFloat codebook (QLoRA, arXiv 2305.14314): quantiles of the normal distribution, scaled to end at 1.

    Args:
        offset: probability of the outermost quantile, above 0.5 and below 1.
        use_extra_value: 8 values on one side of zero and 7 on the other (15 in all); otherwise 7 on each.

    Returns:
        float32 [256], ascending, filled up with zeros.

    Raises:
        InvalidArgumentError: offset is not accepted.
    """
    if not 0.5 < offset < 1.0:
        raise InvalidArgumentError(f"create_normal_map: offset is {offset}; it is a probability above 0.5 and below 1")
    quantiles = NormalDist().inv_cdf
    above = [quantiles(float(p)) for p in _spaced(offset, 0.5, 9 if use_extra_value else 8)[:-1]]
    below = [-quantiles(float(p)) for p in _spaced(offset, 0.5, 8)[:-1]]
    return _tensor(_scaled(above + below + [0.0] * (256 - len(above) - len(below))))


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> torch.Tensor:
    """Build the codebook of a small floating-point format, scaled to end at 1.

    The field e of `exponent_bits` and the fraction f of `precision_bits` stand for (1 + f) 2^(bias + 1 - e), and where e = 0 for
    f 2^-bias, with bias = 2^(exponent_bits - 1).

    Args:
        signed: one bit is a sign.
        exponent_bits: 1 to 7; with 8, the largest value would not be a float32.
        precision_bits: at least 0.
        total_bits: up to 8; the sum of the others.

    Returns:
        float32 [256], ascending, filled up with zeros.

    Raises:
        InvalidArgumentError: the bits do not add up.
    """
    _require_bits("create_fp8_map", total_bits)
    if not 1 <= exponent_bits <= 7 or precision_bits < 0 or exponent_bits + precision_bits + bool(signed) != total_bits:
        raise InvalidArgumentError(
            f"create_fp8_map: {exponent_bits} exponent and {precision_bits} precision bits{' and a sign' if signed else ''} "
            f"do not make {total_bits}; there must be 1 to 7 exponent bits, and the sum must be total_bits"
        )
    bias = 2 ** (exponent_bits - 1)
    fractions = [i / 2**precision_bits for i in range(2**precision_bits)]
    magnitudes = [fraction * 2.0**-bias for fraction in fractions]
    for exponent in range(1, 2**exponent_bits):
        magnitudes += [(1.0 + fraction) * 2.0 ** (bias + 1 - exponent) for fraction in fractions]
    return _tensor(_scaled(_with_signs(magnitudes, signed) + [0.0] * (256 - 2**total_bits)))


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Build the dynamic codebook (arXiv 1511.04561): each further exponent bit is a tenth, and halves the number of fractions.

    Args:
        signed: values of both signs; otherwise twice as many positive ones.
        max_exponent_bits: decades that are covered. Where signed, at least 1, and more than total_bits - 1 are the same as that
            many; otherwise total_bits - 1.
        total_bits: 2 to 8.

    Returns:
        float32 [256], ascending; filled up with zeros where total_bits < 8.

    Raises:
        InvalidArgumentError: the bits are not accepted.
    """
    return _tensor(_dynamic_values(signed, max_exponent_bits, total_bits))


def _dynamic_values(signed: bool, max_exponent_bits: int = 7, total_bits: int = 8) -> List[float]:
    _require_bits("create_dynamic_map", total_bits)
    decades = min(max_exponent_bits, total_bits - 1)
    if decades < 1 or (not signed and max_exponent_bits != total_bits - 1):
        accepted = "at least 1" if signed else f"total_bits - 1 = {total_bits - 1} in an unsigned map"
        raise InvalidArgumentError(
            f"create_dynamic_map: max_exponent_bits is {max_exponent_bits} of {total_bits} bits; it must be {accepted}"
        )
    fraction_bits = total_bits - 1 - decades
    values: List[float] = [0.0, 1.0]
    for i in range(decades):
        values += _with_signs(_decade(i + 1 - decades, 2 ** (i + fraction_bits + (0 if signed else 1))), signed)
    if fraction_bits:  # the codes of which all exponent bits are zero stand for more values of the highest decade
        values += _with_signs(_decade(0, 2**fraction_bits - 1), signed)
    return sorted(values + [0.0] * (256 - len(values)))


def _spaced(start: float, end: float, count: int) -> "np.ndarray":
    """Return evenly spaced float32 values, as `torch.linspace` does on CPUs with a fused multiply-add."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    # The product is exact in float64, so that rounding to float32 afterwards is the only rounding that matters.
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


def _decade(exponent: int, intervals: int) -> List[float]:
    """Return the centres of equal intervals of [0.1, 1], times 10^exponent."""
    bounds = _spaced(0.1, 1.0, intervals + 1)
    return (np.float32(10.0**exponent) * ((bounds[:-1] + bounds[1:]) / np.float32(2.0))).tolist()


def _with_signs(magnitudes: List[float], signed: bool) -> List[float]:
    return magnitudes + [-value for value in magnitudes] if signed else magnitudes


def _scaled(values: List[float]) -> List[float]:
    """Sort, and divide by the largest, in float32."""
    table = np.sort(np.array(values, np.float32))
    return (table / table.max()).tolist()


def _tensor(values: List[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _require_bits(function: str, total_bits: int) -> None:
    if not 2 <= total_bits <= 8:
        raise InvalidArgumentError(f"{function}: total_bits is {total_bits}; it must be from 2 to 8")


#: Built-in codebooks: the values by code.
_BUILT_IN: Dict[str, Tuple[float, ...]] = {
    # NormalFloat (arXiv 2305.14314): `create_normal_map()` without its padding.
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    # Sign, two exponent bits, one fraction bit. The code of -0 stands for 0.
    "fp4": tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)),
    # AbnormalFloat for blocks of 64 (arXiv 2306.06965), in descending order as bitsandbytes has it.
    "af4": (
        *(1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164),
        *(0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0),
    ),
    "int4": tuple(value / 7 for value in (7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7)),
    "dynamic": tuple(_dynamic_values(signed=True)),
    "udynamic": tuple(_dynamic_values(signed=False)),
}

#: Codebooks that have been used, by name and device: copying one to a device anew would synchronize.
_cache: Dict[Tuple[str, torch.device], torch.Tensor] = {}
registry.on_change.append(_cache.clear)


def get_codebook(name: str, device: Device = "cpu") -> torch.Tensor:
    """Return the codebook of that name.

    Args:
        name: with 16 values "nf4", "fp4", "af4" and "int4"; with 256 "dynamic" and "udynamic", its unsigned form; or a name that
            the `bnb_codebooks` hook of an installed plugin provides.
        device: where to put it.

    Returns:
        float32 [16] or [256], a new tensor; the value of code c is entry c.

    Raises:
        InvalidArgumentError: there is no such codebook.
    """
    return torch.tensor(_find(name, None), dtype=torch.float32, device=device)


def get_4bit_type(typename: str, device: Device = None, blocksize: int = 64) -> torch.Tensor:
    """Return a codebook of 16 values.

    Args:
        typename: "nf4", "fp4", "af4" (descending), "int4", or a name that a plugin provides.
        device: where to put it; by default "cuda" if there is one, otherwise "cpu".
        blocksize: "af4" was derived for 64, and no other is accepted.

    Returns:
        float32 [16], a new tensor.

    Raises:
        InvalidArgumentError: there is no such codebook of 16 values, or not for this blocksize.
    """
    if typename == "af4" and blocksize != 64:
        raise InvalidArgumentError(f"get_4bit_type: blocksize is {blocksize}; the values of 'af4' are those for 64")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor(_find(typename, 16), dtype=torch.float32, device=device)


def shared_codebook(name: str, device: torch.device, entries: int) -> torch.Tensor:
    """Return a codebook that must not be changed: one tensor for each device, for calls that only read it.

    Raises:
        InvalidArgumentError: there is no such codebook with that number of entries.
    """
    if not ordinary_execution():  # a traced or fake tensor must not outlive its trace
        return torch.tensor(_find(name, entries), dtype=torch.float32, device=device)
    codebook = _cache.get((name, device))
    if codebook is None or codebook.numel() != entries:
        with torch.inference_mode(False):  # what is made in inference mode could not be saved for a backward later
            codebook = _cache[name, device] = torch.tensor(_find(name, entries), dtype=torch.float32, device=device)
    return codebook


def _find(name: str, entries: Optional[int]) -> Tuple[float, ...]:
    values = _BUILT_IN.get(name)
    known = {name: len(values) for name, values in _BUILT_IN.items()}
    if values is None:
        registry.load_all()
        for plugin, codebooks in registry.call_hook("bnb_codebooks"):
            known.update({name: len(values) for name, values in codebooks.items()})
            if name in codebooks:
                values = tuple(float(value) for value in codebooks[name])
                if len(values) not in (16, 256):
                    raise InvalidArgumentError(
                        f"codebook {name!r} of backend {plugin!r} has {len(values)} values; it needs 16 or 256"
                    )
                break
    if values is None or entries not in (None, len(values)):
        names = ", ".join(repr(name) for name, size in known.items() if entries in (None, size))
        size = "" if entries is None else f" with {entries} values"
        raise InvalidArgumentError(f"there is no codebook {name!r}{size}; there are {names}")
    return values
