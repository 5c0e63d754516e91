"""The inputs of the conformance suite are what they are said to be."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from bnb_core.testing import cases, oracle
from bnb_core.testing.tolerances import as_numpy

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_pairwise_covers_every_pair_in_few_rows():
    factors = {"a": range(8), "b": "xyz", "c": (True, False), "d": range(5)}
    rows = [vars(case) for case in cases.pairwise(**factors)]
    for one, other in itertools.combinations(factors, 2):
        found = {(row[one], row[other]) for row in rows}
        assert found == set(itertools.product(factors[one], factors[other]))
    assert len(rows) <= 48  # 40 at least; all combinations are 240


def test_case_names_its_factors():
    assert str(cases.Case(blocksize=64, codebook="nf4")) == "blocksize=64-codebook=nf4"


@pytest.mark.parametrize("entries", [16, 256])
def test_codebooks(entries):
    made = cases.codebooks(entries)
    assert set(made) == set(cases.CODEBOOKS_4BIT if entries == 16 else cases.CODEBOOKS_8BIT)
    for name, codebook in made.items():
        assert codebook.shape == (entries,), name
        assert codebook.dtype == torch.float32, name
    ordered = {name for name, codebook in made.items() if (codebook[1:] >= codebook[:-1]).all()}
    assert not {"unsorted", "repeated", "grid"} & ordered
    assert len(made["repeated"].unique()) < entries
    assert (made["positive"] >= 0).all()
    assert not (made["zeroless"] == 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_values_have_their_kind(kind, dtype):
    codebook = cases.codebooks(16)["grid"]
    x = as_numpy(cases.values(kind, 64 * 9 + 7, 64, dtype, codebook))
    assert x.shape == (583,)
    absmax = oracle.quantize_blockwise(x, as_numpy(codebook), 64)[1]
    tiny = torch.finfo(dtype).tiny
    holds = {
        "normal": lambda: np.isfinite(x).all() and len(np.unique(x)) > 300,
        "zeros": lambda: (absmax == 0).any() and absmax[-1] == 0 and absmax.any() and np.signbit(x[x == 0]).any(),
        "constant": lambda: len(np.unique(x)) == 1,
        "ties": lambda: _on_midpoints(x, codebook) > 50,
        "edges": lambda: len(np.unique(absmax)) == len(absmax),
        "subnormal": lambda: ((x != 0) & (np.abs(x) < tiny)).any() and (absmax < tiny).any() and (absmax > 0.1).any(),
        "small": lambda: dtype == torch.float16 or ((absmax < 2.0**-126).any() and (absmax > 2.0**-126).any()),
        "huge": lambda: np.isfinite(x).all() and (np.abs(x) > torch.finfo(dtype).max / 4).any(),
        "wide": lambda: np.isfinite(x).all() and np.ptp(np.log2(np.abs(x[x != 0]))) > 20,
        "nan": lambda: np.isnan(x).any() and np.isnan(absmax[-1]) and np.isfinite(absmax).any(),
        "inf": lambda: np.isinf(x).any() and not np.isfinite(absmax[-1]),
    }
    assert holds[kind]()


def _on_midpoints(x, codebook):
    """Count the values whose scaled value is exactly a midpoint."""
    entries = np.sort(as_numpy(codebook))
    midpoints = (entries[:-1] + entries[1:]) / 2
    rows = x[: len(x) // 64 * 64].reshape(-1, 64)
    return np.isin(rows / np.abs(rows).max(1, keepdims=True), midpoints).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entries", [16, 256])
def test_division_gives_another_code_than_the_reciprocal(dtype, entries):
    (absmax, x), codebook = cases.division_shows(dtype, entries)
    assert codebook.shape == (entries,)
    one = np.float32(1)
    scaled, divided = (np.array([value], np.float32) for value in (x.float() * (one / absmax.float()), x.float() / absmax.float()))
    assert oracle.nearest_codes(scaled, as_numpy(codebook)) != oracle.nearest_codes(divided, as_numpy(codebook))


@pytest.mark.parametrize("nested_blocksize", [0, 7])
@pytest.mark.parametrize("experts", [0, 3])
def test_weight_fits_together(experts, nested_blocksize):
    weight = cases.weight_4bit(33 * 5, 32, "nf4", nested_blocksize, experts)
    leading = (experts,) if experts else ()
    assert weight.packed.shape == (*leading, 83)
    assert weight.absmax.shape == (*leading, 6)
    if nested_blocksize:
        assert weight.absmax.dtype == torch.uint8
        assert weight.nested.absmax.shape == (-(-max(experts, 1) * 6 // 7),)


def test_same_values_in_every_process():
    code = (
        "import torch; from bnb_core.testing import cases;"
        "x = cases.values('edges', 100, 32, torch.float32, cases.codebooks(16)['nf4']);"
        "print(x.view(torch.int32).tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout
    here = cases.values("edges", 100, 32, torch.float32, cases.codebooks(16)["nf4"])
    assert other.strip() == str(here.view(torch.int32).tolist())
