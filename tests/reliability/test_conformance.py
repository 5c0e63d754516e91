"""The conformance suite fails a backend with one fault, on the test that is about it, and passes the same backend without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
try:
    from wrong_backends import FAULTS
finally:
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit status of pytest, and message of the failure, for each wrong backend."""
    folder = tmp_path_factory.mktemp("conformance")
    subprocess.run(
        [sys.executable, HERE / "run_conformance.py", folder / "results.json"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return json.loads((folder / "results.json").read_text())


def test_backend_without_a_fault_passes(outcomes):
    assert outcomes["none"] == [pytest.ExitCode.OK, ""]


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(outcomes, name):
    status, message = outcomes[name]
    assert status == pytest.ExitCode.TESTS_FAILED
    assert message.startswith("AssertionError: ")  # a comparison failed, not the faulty kernel itself
