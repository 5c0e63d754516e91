"""Run tests of the conformance suite on each wrong backend, in a process of their own; write which failed, and how, as JSON.

Usage: python run_conformance.py CONTRACT RESULTS.json

CONTRACT says which faults: those in ops of that contract.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
import wrong_backends

from bnb_core import backends
from bnb_core.ops.spec import OPS
from bnb_core.testing import conformance
from bnb_core.testing.loopback import Loopback


class Failures:
    """A pytest plugin that keeps the message of each test that fails."""

    def __init__(self):
        self.messages = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.messages.append(str(report.longrepr.reprcrash.message))


def run(backend, tests, among):
    """Run tests on a backend until one fails; return pytest's exit status and the message."""
    failures = Failures()
    nodes = [f"{getattr(conformance, test).__code__.co_filename}::{test}" for test in tests]
    alone = ["-c", os.devnull, "--rootdir", ".", "--noconftest", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main([*nodes, *alone, "--bnb-backend", backend.name, "-x", "-k", among], plugins=[failures])
    return int(status), "".join(failures.messages)


def main(contract, path):
    faults = {name: fault for name, fault in wrong_backends.FAULTS.items() if OPS[next(iter(fault.wrappers))].contract == contract}
    right = Loopback("right").backend
    backends.register(right)
    tests = sorted({fault.caught_by for fault in faults.values()})
    results = {"none": run(right, tests, "bfloat16 or int8-")}
    for name, fault in faults.items():
        backend = Loopback("wrong_" + name, wrappers=fault.wrappers).backend
        backends.register(backend)
        results[name] = run(backend, [fault.caught_by], fault.among)
    Path(path).write_text(json.dumps(results))


main(*sys.argv[1:])
