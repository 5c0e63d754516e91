"""The conformance suite fails a backend with one fault, on the test that is about it, and passes the same backend without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("contract", ["exact", "product", "optimizer"])
def test_every_fault_is_caught_by_its_test(tmp_path, contract):
    subprocess.run(
        [sys.executable, Path(__file__).with_name("run_conformance.py"), contract, "results.json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    outcomes = json.loads((tmp_path / "results.json").read_text())
    assert outcomes.pop("none") == [pytest.ExitCode.OK, ""]
    assert len(outcomes) > 5
    # A comparison has to fail: what the faulty kernel itself raises would not show that its result is looked at.
    caught = {
        name
        for name, (status, message) in outcomes.items()
        if status == pytest.ExitCode.TESTS_FAILED and message.startswith("AssertionError: ")
    }
    assert set(outcomes) == caught
