"""Fixtures for the tests of the reference backend: it runs every op, and can be made to cut tensors into tiny pieces."""

import bnb_reference
import pytest
import torch
from bnb_reference import devices

from bnb_core import backends

NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
    + (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)
FP4_MAGNITUDES = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)


@pytest.fixture(autouse=True)
def _reference(_clean_backends):
    backends.register(bnb_reference.backend)  # where the package is on the path without being installed
    backends.set_backend("reference")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    """Run with the usual pieces, which are larger than the tensors of most tests, and with pieces of 64 elements."""
    if request.param == "many pieces":
        monkeypatch.setattr(devices, "CPU_PIECE", 64)


@pytest.fixture
def codebooks():
    """4-bit codebooks by name: sorted, with two zeros, in no order, and with equal entries."""
    generator = torch.Generator().manual_seed(1)
    return {
        "nf4": torch.tensor(NF4),
        "fp4": torch.tensor(FP4_MAGNITUDES + tuple(-value for value in FP4_MAGNITUDES)),
        "shuffled": torch.tensor(NF4)[torch.randperm(16, generator=generator)],
        "repeated": torch.tensor([0.5, -1.0, 0.25, 0.5] * 4),
    }


@pytest.fixture
def nf4(codebooks):
    return codebooks["nf4"]


@pytest.fixture
def dynamic():
    """A codebook of 256 entries that crowd around zero, as those of optimizer states do."""
    positive = torch.logspace(-6, 0, 127, dtype=torch.float64)
    return torch.cat((-positive.flip(0), torch.zeros(2, dtype=torch.float64), positive)).float()


@pytest.fixture
def host_reads_forbidden(monkeypatch):
    """Take the paths that other devices than the CPU take."""
    monkeypatch.setattr(devices, "reads_are_free", lambda device: False)
