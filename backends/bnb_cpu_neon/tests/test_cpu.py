"""Which tier a CPU gets, and what is said to one that gets none."""

import bnb_cpu_neon.cpu
import pytest
from bnb_cpu_neon.cpu import TIERS, Cpu, choose_tier, this_cpu

CARMEL = {"asimd", "fphp", "asimdhp"}
A78AE = CARMEL | {"asimddp"}
V3AE = A78AE | {"i8mm", "bf16"}


def cpu(features, architecture="aarch64"):
    return Cpu(architecture, "a core", frozenset(features))


@pytest.fixture(autouse=True)
def _no_mask(monkeypatch):
    monkeypatch.delenv("BNB_NEON_FEATURES", raising=False)


@pytest.mark.parametrize(("features", "tier"), [({"asimd"}, "baseline"), (CARMEL, "baseline"), (A78AE, "dotprod"), (V3AE, "i8mm")])
def test_best_tier(features, tier):
    assert choose_tier(cpu(features)) == tier


def test_one_of_two_features_is_not_enough():
    assert choose_tier(cpu(A78AE | {"i8mm"})) == "dotprod"


@pytest.mark.parametrize("tier", TIERS)
def test_mask(monkeypatch, tier):
    monkeypatch.setenv("BNB_NEON_FEATURES", tier)
    assert choose_tier(cpu(V3AE)) == tier


def test_mask_beyond_the_cpu(monkeypatch):
    monkeypatch.setenv("BNB_NEON_FEATURES", "i8mm")
    with pytest.raises(ValueError, match=r"BNB_NEON_FEATURES='i8mm' needs bf16, i8mm, which a core lacks"):
        choose_tier(cpu(A78AE))


def test_unknown_mask(monkeypatch):
    monkeypatch.setenv("BNB_NEON_FEATURES", "sve")
    with pytest.raises(ValueError, match=r"'sve' is not one of baseline, dotprod, i8mm"):
        choose_tier(cpu(V3AE))


@pytest.mark.parametrize(
    ("unfit", "needs"),
    [
        (cpu(set()), "a 64-bit ARM CPU with NEON"),
        (cpu({"avx2", "fma"}, "x86_64"), "AVX2, FMA and F16C"),
        (cpu({"vsx"}, "ppc64le"), "a 64-bit ARM CPU with NEON"),
    ],
)
def test_cpu_without_a_tier(unfit, needs):
    with pytest.raises(ValueError, match=f"the kernels need {needs}; this is {unfit.architecture}"):
        choose_tier(unfit)


def test_cores_are_named_by_implementer_and_part(monkeypatch):
    fields = {"CPU implementer": "0x41", "CPU part": "0xd42"}
    monkeypatch.setattr(bnb_cpu_neon.cpu.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(bnb_cpu_neon.cpu, "_cpuinfo", lambda: fields)
    monkeypatch.setattr(bnb_cpu_neon.cpu, "_getauxval", lambda entry: {16: 1 << 1 | 1 << 20, 26: 0}[entry])
    found = this_cpu()
    assert (found.core, found.features) == ("Cortex-A78AE", {"asimd", "asimddp"})
    fields["CPU part"] = "0xfff"
    assert this_cpu().core == "core 0x41/0xfff"
