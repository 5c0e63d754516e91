"""What becomes of the reports of compute-sanitizer's tools, with a program in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Dict

import pytest

SANITIZE = Path(__file__).parents[1] / "tools/sanitize.py"
#: Finds what its tool finds by the environment, and does not run the tests.
STAND_IN = """#!{python}
import os, sys, time
tool = sys.argv[sys.argv.index("--tool") + 1]
faults = int(os.environ.get("FAULTS_" + tool, 0))
time.sleep(float(os.environ.get("SECONDS_" + tool, 0)))
print(sys.argv[sys.argv.index("pytest") + 1 :])
print("========= RACECHECK SUMMARY:" if tool == "racecheck" else "========= ERROR SUMMARY:", faults, "errors")
sys.exit(int(os.environ.get("STATUS_" + tool, 0)))
"""


@pytest.fixture
def sanitize(tmp_path):
    """Run the tool with arguments; returns its status and the lines that it printed."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)

    def run(*arguments: str, path: str = str(tmp_path), **environment: str):
        variables: Dict[str, str] = {**os.environ, **environment, "PATH": path}
        command = [sys.executable, str(SANITIZE), *arguments]
        result = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return result.returncode, result.stdout.splitlines()

    return run


def test_each_tool_runs_the_tests(sanitize):
    status, lines = sanitize("-k", "int8")
    assert status == 0
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"{tool}: ['-k', 'int8']" in lines
        assert f"{tool}: nothing found" in lines


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_faults_are_counted_whatever_the_status_is(sanitize, tool):
    status, lines = sanitize(**{f"FAULTS_{tool}": "3"})
    assert status == 1
    assert f"{tool}: found 3 faults" in lines
    assert "synccheck: nothing found" in lines


def test_tests_that_fail_are_no_success(sanitize):
    status, lines = sanitize("--tools", "memcheck", STATUS_memcheck="1")
    assert status == 1
    assert lines[-1] == "memcheck: the tests failed with status 1"


def test_a_tool_that_takes_too_long_is_ended(sanitize):
    status, lines = sanitize("--tools", "memcheck,synccheck", "--minutes", "0.02", SECONDS_memcheck="60")
    assert status == 1
    assert "memcheck: not finished in 1 s" in lines
    assert "synccheck: nothing found" in lines


def test_no_sanitizer(sanitize, tmp_path):
    status, lines = sanitize(path=str(tmp_path / "nothing"))
    assert status == 1
    assert lines == ["compute-sanitizer is not on the path; it comes with the CUDA toolkit"]
