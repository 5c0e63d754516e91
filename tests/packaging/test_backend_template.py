"""The example of a backend: it passes the conformance suite as it is installed, and the guide that builds it shows its files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnb_core import backends, ops
from bnb_core.backends import BackendFallbackWarning, State
from bnb_core.testing import cases
from bnb_core.testing.expectations import expectation

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "examples" / "backend_template"
GUIDE = ROOT / "docs" / "write-a-backend.md"
BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FILES = [
    "pyproject.toml",
    *(f"src/bnb_numpy/{name}.py" for name in ("__init__", "backend", "kernels")),
    "tests/test_conformance.py",
]

pytestmark = pytest.mark.skipif(not TEMPLATE.is_dir(), reason="the examples are not beside these tests")
installed = pytest.mark.skipif(
    "numpy" not in [entry.name for entry in backends.list_backends()], reason="examples/backend_template is not installed"
)


@installed
def test_conformance():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BNB_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "dequantize_4bit or gemm_4bit"],
        cwd=TEMPLATE,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "\nnumpy: 2 of 19 ops, 4 of 55 (op, dtype) pairs, 0 failures, " in done.stdout


@installed
def test_is_ready_and_not_chosen_by_itself():
    (entry,) = [entry for entry in backends.list_backends() if entry.name == "numpy"]
    assert entry.load().state is State.READY
    assert backends.get_backend().name != "numpy"


@installed
def test_large_weight_runs_on_the_reference(monkeypatch):
    monkeypatch.delenv("BNB_FALLBACK", raising=False)
    N, K = 3, 3 << 20  # 36 MB in float32
    x, weight = cases.activations("normal", (1, K), torch.float32), cases.weight_4bit(N * K, 4096)
    args = (x, *weight.quantized, N, K, None, None)
    with backends.use_backend("numpy"), pytest.warns(BackendFallbackWarning, match="the weight in float32 takes more than 32 MB"):
        y = ops.gemm_4bit(*args)
    expectation(ops.OPS["gemm_4bit"], args)([y])


def _blocks():
    return [(name, text) for name, text in BLOCK.findall(GUIDE.read_text(encoding="utf-8"))]


def test_guide_shows_files_of_the_template():
    assert {name for name, _ in _blocks()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_guide_shows_the_whole_file_as_it_is(name):
    source = (TEMPLATE / name).read_text(encoding="utf-8")
    shown = sorted((text for block, text in _blocks() if block == name), key=source.find)
    for text in shown:
        assert text in source, f"the guide shows something else than {name}:\n{text}"
    assert [line for text in shown for line in text.splitlines() if line] == [line for line in source.splitlines() if line]
