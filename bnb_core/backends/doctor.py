"""Find out what `bnb doctor` shows: versions, selection, backends, who runs what, and what is wrong.

It must work where everything else is broken: each section is examined on its own, and what goes wrong there becomes part of the
report. Only a crash of the whole process is out of its reach.
"""

from __future__ import annotations

import contextlib
import difflib
import platform
import sys
import traceback
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional

import bnb_core
from bnb_core.backends import environment, hardware, selection, tuning
from bnb_core.backends.discovery import INSTALL_HINTS, Entry, State, describe, registry
from bnb_core.backends.dispatch import Plan
from bnb_core.errors import BackendDefinitionError
from bnb_core.ops.spec import API_VERSION, OPS

LEVELS = ("ok", "hint", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        level: `ok`, `hint` (something to do better), `warn` (something is wrong) or `fail` (something does not work).
        message: one line; what was found, and what to do.

    Raises:
        BackendDefinitionError: there is no such level.
    """

    level: str
    message: str

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise BackendDefinitionError(f"level {self.level!r} of a check is not one of {', '.join(LEVELS)}")


@dataclass
class BackendRow:
    """What is shown about one backend."""

    name: str
    state: str
    distribution: str
    priority: Optional[int] = None
    ops: Optional[int] = None
    notes: str = ""


@dataclass
class Runner:
    """Who runs an op on a dtype."""

    backend: Optional[str]
    conditional: bool
    """Whether the backend looks at each call first, so that some may run on another."""
    refused: Dict[str, str]
    """Why the backends before it, or all of them, do not run it."""


@dataclass
class Report:
    """Everything that `bnb doctor` shows; `ready` says whether the selected backends can be used."""

    device: str
    ready: bool = False
    versions: Dict[str, str] = field(default_factory=dict)
    selected: List[str] = field(default_factory=list)
    selected_by: str = ""
    fallback: str = ""
    backends: List[BackendRow] = field(default_factory=list)
    ops: Dict[str, Dict[str, Runner]] = field(default_factory=dict)
    checks: List[Check] = field(default_factory=list)
    tracebacks: Dict[str, str] = field(default_factory=dict)
    """By name of the backend, or of the section, that failed."""

    def add(self, level: str, message: str) -> None:
        """Add a finding."""
        self.checks.append(Check(level, message))

    def fail(self, what: str, error: BaseException) -> None:
        """Add an exception, with its traceback."""
        self.add("fail", f"{what}: {describe(error)}")
        self.keep_traceback(what, error)

    def keep_traceback(self, what: str, error: BaseException) -> None:
        """Keep a traceback for those who ask for it."""
        self.tracebacks[what] = "".join(traceback.format_exception(type(error), error, error.__traceback__))


def examine(device: str = "cpu", *, self_test: bool = False) -> Report:
    """Examine this installation. Loads every backend that is not disabled; raises nothing.

    Args:
        device: torch device whose ops are listed, such as `"cpu"` or `"cuda"`.
        self_test: run a small op with a known answer on each backend that is ready.
    """
    report = Report(device.split(":")[0])
    sections = [_versions, _backends, _selection, _ops, _variables, _hardware, _plugins, _tables]
    if self_test:
        sections.append(_self_tests)
    with contextlib.redirect_stdout(sys.stderr):  # a plugin that prints must not spoil the output of --json
        for section in sections:
            with _surviving(report, section.__name__.strip("_").replace("_", "-")):
                section(report)
    return report


@contextlib.contextmanager
def _surviving(report: Report, what: str) -> Iterator[None]:
    """Turn whatever is raised, SystemExit too, into a finding; only the user's own Ctrl-C passes."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        report.fail(what, error)


def _versions(report: Report) -> None:
    report.versions["bnb-core"] = bnb_core.__version__
    report.versions["backend API"] = "{}.{}".format(*API_VERSION)
    report.versions["torch"] = "cannot be imported"
    report.versions["Python"] = platform.python_version()
    report.versions[platform.system()] = platform.machine()
    with _surviving(report, "torch"):
        import torch

        report.versions["torch"] = str(torch.__version__)
        torch.device(report.device)  # raises for a name that is none


def _backends(report: Report) -> None:
    for message in registry.snapshot().unreadable:
        report.add("warn", message)
    rows = []
    for entry in registry.entries():
        try:
            entry.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the plugin tried to end the process
            entry.settle(State.BROKEN, describe(error), error)
        if entry.error is not None:
            report.keep_traceback(entry.name, entry.error)
            report.add("warn", f"backend {entry.name!r} is {entry.state}; `bnb doctor -v {entry.name}` shows the traceback")
        rows.append(_row(report, entry))
    rows.sort(key=lambda row: (row.state != State.READY, -(row.priority or 0), row.name))
    report.backends = rows


def _row(report: Report, entry: Entry) -> BackendRow:
    row = BackendRow(entry.name, str(entry.state), entry.distribution, notes=entry.reason)
    if entry.backend is not None:
        row.priority, row.ops = entry.backend.priority, len(entry.backend.kernels)
        with _surviving(report, f"description of {entry.name}"):
            row.notes = row.notes or entry.backend.description
    return row


def _selection(report: Report) -> None:
    current = selection.current()
    report.selected, report.selected_by = list(current.names), current.source
    report.fallback = selection.fallback_policy()
    report.selected = [backend.name for backend in current.chain(report.device)]
    report.ready = bool(report.selected)
    if not report.ready:
        report.add("fail", f"no backend here has kernels for {report.device}")


def _ops(report: Report) -> None:
    if not report.ready:  # the reason is in the report already
        return
    current = selection.current()
    for spec in OPS.values():
        runners = report.ops[spec.name] = {}
        for dtype in spec.dtypes:
            steps = Plan(spec, report.device, dtype, current).steps
            first = next((i for i, step in enumerate(steps) if not step.refusal), len(steps))
            kernel = steps[first].kernel if first < len(steps) else None
            runners[dtype] = Runner(
                kernel.backend.name if kernel is not None else None,
                kernel is not None and not kernel.unconditional,
                {step.backend: step.refusal for step in steps[:first]},
            )


def _variables(report: Report) -> None:
    known = {entry.name for entry in registry.entries()} | set(INSTALL_HINTS)
    for message in environment.unknown_variables(known):
        report.add("warn", message)
    for name in environment.names("BNB_DISABLED_BACKENDS"):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            report.add("warn", f"BNB_DISABLED_BACKENDS names {name!r}, which is not installed{hint}")


def _hardware(report: Report) -> None:
    missing = hardware.missing_backend(registry.entries())
    if missing:
        report.add("hint", missing)


def _plugins(report: Report) -> None:
    for entry in registry.entries():
        if entry.backend is not None:
            with _surviving(report, f"checks of {entry.name}"):
                for check in entry.call("bnb_doctor") or ():
                    if not isinstance(check, Check):
                        raise BackendDefinitionError(f"bnb_doctor() returned {check!r}; it must return Check objects")
                    report.add(check.level, f"{entry.name}: {check.message}")


def _tables(report: Report) -> None:
    for entry in registry.entries():
        if entry.state is not State.READY:
            continue
        with _surviving(report, f"table of {entry.name}"):
            found = tuning.tuning_of(entry)
            if found is None:
                continue
            device = found.identity.device
            table = tuning.table(entry.name, found.identity)
            if table is None:
                report.add(
                    "hint", f"{entry.name}: not tuned for {device}; `bnb tune` measures which of its kernels are the fastest there"
                )
            else:
                report.add(
                    "ok", f"{entry.name}: {len(table.cases)} kinds of calls tuned for {device}, {table.measured}: {table.file}"
                )


def _self_tests(report: Report) -> None:
    from bnb_core.backends import self_test

    for entry in registry.entries():
        if entry.state is State.READY and entry.backend is not None:
            what = f"self-test of {entry.name}"
            with _surviving(report, what):
                op = self_test.run(entry.backend)
                if op is None:
                    report.add("hint", f"{what}: it has no op with a known answer here")
                else:
                    report.add("ok", f"{what}: {op} gives the known answer")
            if what in report.tracebacks and entry.name in report.selected:
                report.ready = False
