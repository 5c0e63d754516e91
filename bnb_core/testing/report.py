"""What a run of the conformance suite says: what it ran on, and for which ops and dtypes the backend did what it must."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import pytest

from bnb_core.ops.spec import API_VERSION, OPS

#: Name of the property by which a test's report says its backend, device, op and dtype.
PROPERTY = "bnb_conformance"


class _Pair:
    """What tests have shown of one (op, dtype)."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0
        self.reasons: Set[str] = set()

    @property
    def status(self) -> str:
        if self.failed:
            return "failed"
        return "passed" if self.passed else "skipped" if self.reasons else "not run"


class _Results:
    """What tests have shown of one backend."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.pairs: Dict[Tuple[str, str], _Pair] = {(op, dtype): _Pair() for op, spec in OPS.items() for dtype in spec.dtypes}
        self.failures: List[str] = []
        self.skipped = 0

    def add(self, report: pytest.TestReport, op: Optional[str], dtype: Optional[str]) -> None:
        pair = self.pairs[op, dtype] if op is not None and dtype is not None else _Pair()
        if report.failed:
            self.failures.append(report.nodeid)
            pair.failed += 1
        elif report.skipped:
            self.skipped += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            pair.reasons.add(reason.replace("Skipped: ", "", 1))
        elif report.when == "call":
            pair.passed += 1

    def ops(self) -> int:
        """Count the ops of which every dtype that was tested passed."""
        statuses: Dict[str, Set[str]] = {op: set() for op in OPS}
        for (op, _), pair in self.pairs.items():
            statuses[op].add(pair.status)
        return sum("passed" in found and "failed" not in found for found in statuses.values())

    def summary(self) -> str:
        passed = sum(pair.status == "passed" for pair in self.pairs.values())
        return (
            f"{self.ops()} of {len(OPS)} ops, {passed} of {len(self.pairs)} (op, dtype) pairs, "
            f"{len(self.failures)} failures, {self.skipped} skipped"
        )

    def as_dict(self) -> Dict[str, Any]:
        table: Dict[str, Dict[str, Any]] = {op: {} for op in OPS}
        for (op, dtype), pair in self.pairs.items():
            table[op][dtype] = {"status": pair.status, "tests": pair.passed + pair.failed, "skipped": sorted(pair.reasons)}
        return {"device": self.device, "summary": self.summary(), "ops": table, "failures": self.failures}


class Report:
    """The pytest plugin that collects results and prints them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._results: Dict[str, _Results] = {}

    def pytest_report_header(self) -> List[str]:
        """Say what is tested, with what."""
        name = self._config.getoption("--bnb-backend")
        if not name:
            return []
        from bnb_core.testing.subject import Subject

        versions = _versions()
        subject = Subject(name, self._config.getoption("--bnb-device"))
        written_for = "{}.{}".format(*subject.backend.api_version)
        lines = [
            f"bnb: bnb-core {versions['bnb_core']}, backend API {versions['api_version']}, torch {versions['torch']}",
            f"bnb backend: {name} ({_distribution(name)}; written for backend API {written_for}) on {subject.device}",
        ]
        from bnb_core.backends import environment, list_backends

        lines += [f"bnb environment: {name}={os.environ[name]}" for name in sorted(environment.VARIABLES) if name in os.environ]
        return lines + [f"bnb environment: {line}" for line in environment.unknown_variables(e.name for e in list_backends())]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one phase of one test."""
        properties: Dict[str, Any] = dict(report.user_properties)
        if PROPERTY in properties:
            name, device, op, dtype = properties[PROPERTY]
            if name not in self._results:
                self._results[name] = _Results(device)
            self._results[name].add(report, op, dtype)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print one line for each backend, and write the file."""
        for name, results in self._results.items():
            terminalreporter.write_line(f"{name}: {results.summary()}", red=bool(results.failures), green=not results.failures)
        path = self._config.getoption("--bnb-report")
        if path and self._results:
            backends = {name: {"distribution": _distribution(name), **results.as_dict()} for name, results in self._results.items()}
            Path(path).write_text(json.dumps({**_versions(), "backends": backends}, indent=2) + "\n")


def _versions() -> Dict[str, str]:
    import torch

    from bnb_core import __version__

    return {"bnb_core": __version__, "api_version": "{}.{}".format(*API_VERSION), "torch": torch.__version__}


def _distribution(backend: str) -> str:
    from bnb_core.backends import list_backends

    return next((entry.distribution for entry in list_backends() if entry.name == backend), "gone")
