"""Inputs that ops are tried on: ordinary ones, and the ones that kernels get wrong. All are CPU tensors, the same in every run."""

from __future__ import annotations

import functools
import itertools
import zlib
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
import torch

from bnb_core.ops.spec import Nested
from bnb_core.quantization.codebooks import create_dynamic_map, get_4bit_type
from bnb_core.testing.tolerances import as_numpy, as_torch


class Case(SimpleNamespace):
    """One combination of factors, by name."""

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in vars(self).items())


def pairwise(**factors: Sequence[Any]) -> List[Case]:
    """Choose few combinations in which every two values of different factors meet at least once."""
    names = list(factors)
    choices = {name: range(len(values)) for name, values in factors.items()}
    missing: Set[Tuple[Tuple[str, int], ...]] = {
        ((a, i), (b, j)) for a, b in itertools.combinations(names, 2) for i in choices[a] for j in choices[b]
    }
    rows: List[Case] = []
    while missing:
        row = dict(min(missing))
        for name in names:
            if name not in row:
                row[name] = max(choices[name], key=lambda i: len(_pairs({**row, name: i}, names) & missing))
        missing -= _pairs(row, names)
        rows.append(Case(**{name: factors[name][row[name]] for name in names}))
    return rows


def _pairs(row: Dict[str, int], names: Sequence[str]) -> Set[Tuple[Tuple[str, int], ...]]:
    return set(itertools.combinations([(name, row[name]) for name in names if name in row], 2))


def random(*seed: Any) -> np.random.Generator:
    """Return a generator that is the same for the same seed in every process."""
    return np.random.default_rng(zlib.crc32(repr([str(part) for part in seed]).encode()))


# ------------------------------------------------------------------------------------------------------------------------ codebooks


@functools.lru_cache(maxsize=None)
def codebooks(entries: int) -> Dict[str, torch.Tensor]:
    """Return codebooks of 16 or 256 entries by name.

    Besides the usual ones: entries in no order; entries that occur several times; entries of one sign only; no zero, so that a
    midpoint is zero; and a grid whose midpoints are exact in every dtype, so that inputs can lie on them.
    """
    rng = random("codebooks", entries)
    uniform = np.sort(rng.uniform(-1, 1, entries)).astype(np.float32)
    shuffled = rng.permutation(entries)
    positive = np.linspace(0.0625, 1, entries // 2, dtype=np.float32)
    made = {
        "unsorted": uniform[shuffled],
        "repeated": np.repeat(uniform[:: max(entries // 8, 1)], entries // 8 if entries > 16 else 2)[shuffled],
        "positive": np.sort(rng.uniform(0, 1, entries)).astype(np.float32),
        "zeroless": np.concatenate([-positive[::-1], positive]),
        "grid": ((np.arange(entries) - entries // 2 + 1) / (entries // 2)).astype(np.float32)[shuffled],
    }
    known = (
        {name: get_4bit_type(name, device="cpu") for name in ("nf4", "fp4")}
        if entries == 16
        else {"dynamic": create_dynamic_map(signed=True), "dynamic_unsigned": create_dynamic_map(signed=False)}
    )
    return {**known, **{name: torch.from_numpy(values) for name, values in made.items()}}


CODEBOOKS_4BIT = ("nf4", "fp4", "unsorted", "repeated", "positive", "zeroless", "grid")
CODEBOOKS_8BIT = ("dynamic", "dynamic_unsigned", "unsorted", "repeated", "positive", "zeroless", "grid")


def _midpoints(codebook: torch.Tensor) -> np.ndarray:
    entries = np.sort(as_numpy(codebook))
    return (entries[:-1] + entries[1:]) * np.float32(0.5)


# -------------------------------------------------------------------------------------------------------------- values to quantize


def sizes(blocksize: int) -> List[int]:
    """List numbers of elements around the ends of bytes and blocks."""
    return [1, 2, 3, blocksize - 1, blocksize, blocksize + 1, 2 * blocksize + 7, 5 * blocksize - 3]


#: How many sizes `sizes` lists.
SIZES = 8


def values(kind: str, n: int, blocksize: int, dtype: torch.dtype, codebook: torch.Tensor) -> torch.Tensor:
    """Return n values of a kind.

    Args:
        kind: a key of `KINDS`.
        n: number of elements.
        blocksize: where blocks begin.
        dtype: float32, float16 or bfloat16.
        codebook: the one that the values are to be difficult for.
    """
    rng = random(kind, n, blocksize, dtype)
    made = np.asarray(KINDS[kind](rng, n, blocksize, dtype, codebook), np.float32)
    return as_torch(made, dtype)


def _normal(rng: np.random.Generator, n: int, *_: Any) -> np.ndarray:
    return rng.standard_normal(n)


def _zeros(rng: np.random.Generator, n: int, blocksize: int, *_: Any) -> np.ndarray:
    """Blocks of zeros of both signs, the first and the last among them, and single zeros elsewhere."""
    x = rng.standard_normal(n) * rng.integers(0, 2, n)
    last = (n - 1) // blocksize
    empty = np.arange(n) // blocksize % 2 == last % 2
    return np.where(empty | (np.arange(n) < blocksize), np.copysign(0.0, rng.standard_normal(n)), x)


def _constant(rng: np.random.Generator, n: int, *_: Any) -> np.ndarray:
    return np.full(n, -0.7)


def _ties(rng: np.random.Generator, n: int, blocksize: int, dtype: torch.dtype, codebook: torch.Tensor) -> np.ndarray:
    """Values on midpoints, and next to them, in blocks whose absmax is a power of two: scaling is exact."""
    return _around_midpoints(rng, 2.0 ** rng.integers(-4, 5, n), n, blocksize, dtype, codebook)


def _edges(rng: np.random.Generator, n: int, blocksize: int, dtype: torch.dtype, codebook: torch.Tensor) -> np.ndarray:
    """Values as near to midpoints as the dtype allows, in blocks of any absmax: every rounding of the scaling shows."""
    return _around_midpoints(rng, np.exp2(rng.uniform(-8, 8, n)), n, blocksize, dtype, codebook)


def _around_midpoints(
    rng: np.random.Generator, largest: np.ndarray, n: int, blocksize: int, dtype: torch.dtype, codebook: torch.Tensor
) -> np.ndarray:
    block = np.arange(n) // blocksize
    absmax = as_numpy(as_torch(largest[block].astype(np.float32), dtype))
    midpoints = np.clip(_midpoints(codebook), -1, 1)
    x = as_torch((midpoints[rng.integers(0, len(midpoints), n)] * absmax).astype(np.float32), dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    nudged = as_numpy((x.view(bits) + torch.from_numpy(rng.integers(-1, 2, n)).to(bits)).view(dtype))
    unnudged = as_numpy(x)
    x_near = np.where((unnudged != 0) & (np.abs(nudged) <= absmax), nudged, unnudged)
    return np.where(np.arange(n) % blocksize == 0, absmax, x_near)


def _subnormal(rng: np.random.Generator, n: int, blocksize: int, dtype: torch.dtype, *_: Any) -> np.ndarray:
    """Blocks of the smallest numbers of the dtype, and blocks of ordinary ones with such among them."""
    digits = -np.log2(torch.finfo(dtype).eps)
    tiny = torch.finfo(dtype).tiny * np.exp2(-rng.uniform(0, digits, n)) * rng.choice([-1, 1], n)
    ordinary = (np.arange(n) // blocksize % 2 == 1) & (rng.random(n) < 0.5)
    return np.where(ordinary, rng.standard_normal(n), tiny)


def _small(rng: np.random.Generator, n: int, blocksize: int, *_: Any) -> np.ndarray:
    """Blocks whose absmax is around 2^-126, below which scaling no longer divides by it."""
    return rng.uniform(-1, 1, n) * np.exp2(-126 + rng.uniform(-3, 3, n)[np.arange(n) // blocksize])


def _huge(rng: np.random.Generator, n: int, blocksize: int, dtype: torch.dtype, *_: Any) -> np.ndarray:
    """Values up to the dtype's largest: in float32 and bfloat16 the scale is then subnormal."""
    return rng.uniform(-1, 1, n) ** 3 * torch.finfo(dtype).max


def _wide(rng: np.random.Generator, n: int, *_: Any) -> np.ndarray:
    return rng.choice([-1, 1], n) * np.exp2(rng.uniform(-24, 15, n))


def _nan(rng: np.random.Generator, n: int, blocksize: int, *_: Any) -> np.ndarray:
    """A NaN in the last block and in some others."""
    return _with_specials(rng, n, blocksize, [np.nan])


def _inf(rng: np.random.Generator, n: int, blocksize: int, *_: Any) -> np.ndarray:
    """Infinities, and a NaN beside them, in the last block and in some others."""
    return _with_specials(rng, n, blocksize, [np.inf, -np.inf, np.inf, np.nan])


def _with_specials(rng: np.random.Generator, n: int, blocksize: int, specials: Sequence[float]) -> np.ndarray:
    x = rng.standard_normal(n)
    at = [n - 1, *rng.integers(0, n, n // (3 * blocksize))]
    x[at] = rng.choice(specials, len(at))
    x[n - 1] = specials[0]
    return x


KINDS: Dict[str, Callable[..., np.ndarray]] = {
    "normal": _normal,
    "zeros": _zeros,
    "constant": _constant,
    "ties": _ties,
    "edges": _edges,
    "subnormal": _subnormal,
    "small": _small,
    "huge": _huge,
    "wide": _wide,
    "nan": _nan,
    "inf": _inf,
}


def division_shows(dtype: torch.dtype, entries: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return an absmax, a value and a codebook, with which x / absmax gives another code than x * (1 / absmax)."""
    rng = random("division", dtype, entries)
    absmax, x = (as_numpy(as_torch(rng.uniform(low, 1, 4096).astype(np.float32), dtype)) for low in (0.5, 0.1))
    scaled, quotient = x * (np.float32(1) / absmax), x / absmax
    # Two entries whose midpoint is the product: it lies strictly below the quotient, but not below the product itself.
    lower, upper = scaled - np.float32(2**-9), scaled + np.float32(2**-9)
    usable = (scaled < quotient) & (x < absmax) & ((lower + upper) * np.float32(0.5) == scaled)
    at = int(np.flatnonzero(usable)[0])
    codebook = np.linspace(-1, 0, entries, dtype=np.float32)
    codebook[-2:] = lower[at], upper[at]
    return as_torch(np.array([absmax[at], x[at]], np.float32), dtype), torch.from_numpy(codebook)


# ------------------------------------------------------------------------------------------------------------------ 4-bit weights


class Weight4bit(NamedTuple):
    """A 4-bit tensor as ops take it."""

    packed: torch.Tensor
    absmax: torch.Tensor
    codebook: torch.Tensor
    blocksize: int
    nested: Optional[Nested]

    @property
    def quantized(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """The arguments that ops take one after the other."""
        return self.packed, self.absmax, self.codebook, self.blocksize


def weight_4bit(
    n: int,
    blocksize: int,
    codebook: str = "nf4",
    nested_blocksize: int = 0,
    experts: int = 0,
    scale: float = 1.0,
) -> Weight4bit:
    """Return a tensor with random codes and scales.

    Args:
        n: elements of the tensor, or of each expert.
        blocksize: elements that share a scale.
        codebook: a key of `codebooks(16)`.
        nested_blocksize: scales that share a nested scale; 0 for plain scales.
        experts: number of tensors, stacked; 0 for one alone.
        scale: of the scales.
    """
    rng = random("weight", n, blocksize, codebook, nested_blocksize, experts, scale)
    leading = (experts,) if experts else ()
    blocks = (*leading, -(-n // blocksize))
    packed = torch.from_numpy(rng.integers(0, 256, (*leading, (n + 1) // 2)).astype(np.uint8))
    if not nested_blocksize:
        absmax = (rng.uniform(0.1, 2, blocks) * scale).astype(np.float32)
        return Weight4bit(packed, torch.from_numpy(absmax), codebooks(16)[codebook], blocksize, None)
    codes = rng.integers(0, 256, blocks).astype(np.uint8)
    nested_absmax = (rng.uniform(0.1, 1, -(-codes.size // nested_blocksize)) * scale).astype(np.float32)
    nested = Nested(torch.from_numpy(nested_absmax), codebooks(256)["dynamic"], torch.tensor(1.5 * scale), nested_blocksize)
    return Weight4bit(packed, torch.from_numpy(codes), codebooks(16)[codebook], blocksize, nested)


# ----------------------------------------------------------------------------------------------------------------------- products


def activations(kind: str, shape: Tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return what is multiplied by a weight.

    Args:
        kind: "normal"; "positive", where errors do not cancel; "cancelling", where large terms do; "spiky", one large value a row.
        shape: of the result.
        dtype: float32, float16 or bfloat16.
    """
    rng = random("activations", kind, shape, dtype)
    x = rng.standard_normal(shape)
    if kind == "positive":
        x = np.abs(x)
    elif kind == "cancelling":
        x[..., 1::2] = -x[..., : x.shape[-1] // 2 * 2 : 2] * 1.001
        x *= 64
    elif kind == "spiky" and x.size:
        x[..., rng.integers(0, x.shape[-1])] = 1000.0
    else:
        assert kind in ("normal", "spiky"), kind
    return as_torch(x.astype(np.float32), dtype)


def one_hot(columns: Iterable[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows with a single 1, in these columns: a product with them shows single columns of the weight."""
    columns = list(columns)
    x = torch.zeros(len(columns), width, dtype=dtype)
    x[range(len(columns)), columns] = 1
    return x


def int8_codes(shape: Tuple[int, ...], low: int = -127) -> torch.Tensor:
    """Return random int8 codes from `low` to 127."""
    return torch.from_numpy(random("codes", shape, low).integers(low, 128, shape).astype(np.int8))


def scales(count: int) -> torch.Tensor:
    """Return random positive float32 scales."""
    return torch.from_numpy(random("scales", count).uniform(0.1, 2, count).astype(np.float32))


def bias(features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a random bias."""
    return as_torch(random("bias", features).standard_normal(features).astype(np.float32), dtype)


def bytes_of(n: int) -> torch.Tensor:
    """Return n bytes, in which every value occurs if there is room."""
    return torch.from_numpy(random("bytes", n).permutation(np.arange(n) % 256).astype(np.uint8))


def integers(shape: Tuple[int, ...], magnitude: int) -> torch.Tensor:
    """Return random int32 numbers from -magnitude to magnitude."""
    return torch.from_numpy(random("integers", shape, magnitude).integers(-magnitude, magnitude + 1, shape).astype(np.int32))


# ---------------------------------------------------------------------------------------------------------------- scales of blocks

#: Kinds of scales to dequantize with: products overflow with "huge" ones and are subnormal with "tiny" ones.
ABSMAX: Dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "ordinary": lambda rng, count: rng.uniform(0.01, 10, count),
    "huge": lambda rng, count: np.exp2(rng.uniform(14, 128, count)),
    "tiny": lambda rng, count: np.exp2(-rng.uniform(14, 149, count)),
    "special": lambda rng, count: rng.choice([0.0, -0.0, np.nan, np.inf, 1.0], count),
}


def absmax(kind: str, count: int) -> torch.Tensor:
    """Return float32 scales of a kind of `ABSMAX`."""
    return torch.from_numpy(ABSMAX[kind](random("absmax", kind, count), count).astype(np.float32))


# --------------------------------------------------------------------------------------------------------------- rows for LLM.int8


def _outliers(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Some columns with elements of all sizes around the threshold of 6, some of them exactly there."""
    columns = rng.random(x.shape[-1]) < 0.3
    return np.where(columns & (rng.random(x.shape) < 0.5), rng.choice([6.0, -6.0, 5.96875, 60.0, -800.0], x.shape), x)


def _zero_rows(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    return x * (np.arange(x.shape[0]) % 2)[:, None]


def _halves(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Rows whose absmax is 127, so that scaling is exact, of values halfway between two codes."""
    halves = rng.integers(-127, 127, x.shape) + 0.5
    halves[:, :1] = 127
    return halves


def _sprinkled(*specials: float) -> Callable[[np.random.Generator, np.ndarray], np.ndarray]:
    return lambda rng, x: np.where(rng.random(x.shape) < 0.05, rng.choice(specials, x.shape), x)


INT8_KINDS: Dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "normal": lambda rng, x: x,
    "outliers": _outliers,
    "zero rows": _zero_rows,
    "halves": _halves,
    "subnormal": lambda rng, x: x * 2.0**-127,
    "small": lambda rng, x: x * np.exp2(-120 + rng.uniform(-2, 2, (x.shape[0], 1))),
    "huge": lambda rng, x: np.clip(x, -1, 1) * 6e4,
    "nan": _sprinkled(np.nan),
    "inf": _sprinkled(np.inf, -np.inf, np.nan),
}


def int8_values(kind: str, shape: Tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return rows of a kind of `INT8_KINDS`."""
    rng = random("int8", kind, shape, dtype)
    return as_torch(INT8_KINDS[kind](rng, rng.standard_normal(shape)).astype(np.float32), dtype)
