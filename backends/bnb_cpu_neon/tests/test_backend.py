"""The backend as the core sees it: complete, in the tier that the CPU has, and usable from any thread and after a fork."""

import os

import bnb_cpu_neon
import pytest
import torch
from bnb_cpu_neon import engine
from bnb_cpu_neon.cpu import TIERS, this_cpu

from bnb_core import backends, ops
from bnb_core.ops.spec import OPS


@pytest.fixture(autouse=True)
def _neon(_clean_backends):
    backends.set_backend("neon")


def weight(rows=64, columns=64):
    packed = torch.arange(rows * columns // 2).to(torch.uint8)
    return packed, torch.ones(rows * columns // 64), torch.linspace(-1, 1, 16), 64


def test_every_op_on_every_dtype():
    assert set(bnb_cpu_neon.backend.kernels) == set(OPS)
    for name, kernel in bnb_cpu_neon.backend.kernels.items():
        assert kernel.dtypes == set(OPS[name].dtypes), name
        assert kernel.when is None, name


def test_best_tier_is_used(monkeypatch):
    monkeypatch.delenv("BNB_NEON_FEATURES", raising=False)
    assert engine.load()
    assert engine.tier == os.environ.get("BNB_NEON_EXPECTED_TIER", this_cpu().best_tier)


@pytest.mark.parametrize("tier", [tier for tier in TIERS if not this_cpu().lacks(tier)])
def test_doctor_names_core_features_tier_and_threads(run_python, tier):
    result = run_python("from bnb_core.cli import main; main(['doctor'])", BNB_NEON_FEATURES=tier, BNB_BACKEND="neon")
    assert result.returncode == 0, result.output
    cpu, threads = this_cpu(), torch.get_num_threads()
    core = os.environ.get("BNB_NEON_EXPECTED_CORE", cpu.core)
    on = f"{core}, {' '.join(sorted(cpu.features))}" if cpu.architecture == "aarch64" else "NEON emulated on x86_64"
    assert f"{on}, tier {tier}, {threads} thread{'s' if threads > 1 else ''}" in result.output


def test_unknown_tier_makes_the_backend_unavailable(run_python):
    result = run_python("import bnb_core.backends as b; b.get_backend('neon')", BNB_NEON_FEATURES="avx")
    assert "BNB_NEON_FEATURES='avx' is not one of baseline, dotprod, i8mm" in result.output


def test_native_module_is_not_loaded_before_the_cpu_was_looked_at(run_python):
    code = "import sys, bnb_cpu_neon; assert 'bnb_cpu_neon._native' not in sys.modules"
    assert run_python(code).returncode == 0


def test_another_versions_native_module_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "__version__", "9.9")
    assert engine.load().reason.endswith("reinstall bnb-cpu-neon")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_fork(run_python):
    code = """
import os, torch
from bnb_core import ops
torch.set_num_threads(2)
packed, absmax, codebook = torch.zeros(1 << 17, dtype=torch.uint8), torch.ones(1 << 12), torch.linspace(-1, 1, 16)
def call():
    return ops.dequantize_4bit(packed, absmax, codebook, 64, (1 << 18,), torch.float32, None)
call()
child = os.fork()
if child == 0:
    result = call()  # torch's own threads do not survive a fork, so it is looked at one by one
    os._exit(0 if all(result[i].item() == -1 for i in (0, 1 << 17, -1)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    result = run_python(code, BNB_BACKEND="neon")
    assert result.returncode == 0, result.output


def test_results_do_not_depend_on_threads():
    packed, absmax, codebook, blocksize = weight(256, 512)
    x = torch.randn(33, 512)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.gemm_4bit(x, packed, absmax, codebook, blocksize, 256, 512, None, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_are_rounded_once(dtype):
    """Far within the bound of narrow dtypes: nothing but the result is rounded to them."""
    packed, absmax, codebook, blocksize = weight(48, 96)
    dense = ops.dequantize_4bit(packed, absmax, codebook, blocksize, (48, 96), torch.float32, None).double()
    for rows in (1, 7):
        x = torch.randn(rows, 96).to(dtype)
        exact = x.double() @ dense.t()
        y = ops.gemm_4bit(x, packed, absmax, codebook, blocksize, 48, 96, None, None).double()
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 96 * 2.0**-23 * (x.double().abs() @ dense.abs().t())
        assert ((y - exact).abs() <= bound).all()
