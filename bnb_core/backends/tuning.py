"""Measure which way of running a call is the fastest on this machine, and keep the tables that come of it.

A backend that has several ways, paths, to run a call says so by the hook `bnb_tune`. Here its cases are measured and written to a
file, one for each backend and device, which the backend reads at its first call. A file that cannot be used is passed over with
one warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from bnb_core.backends.discovery import Entry, registry
from bnb_core.errors import BackendDefinitionError, StorageError

logger = logging.getLogger("bnb_core.backends")

#: Of files. Another number is another layout.
FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """What a table is of.

    Args:
        device: names the device so that another that is as fast has the same name, such as `"Orin, 16 multiprocessors"`.
        conditions: what else the times depend on, such as the versions of driver and package. A table is used only where all are
            the same as when it was measured.
    """

    device: str
    conditions: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """A kind of call that has several paths.

    Args:
        name: what the backend looks the case up by, such as `"bfloat16 4096x4096, 16 rows"`.
        measure: runs the call by each path, and returns the microseconds by the path's name.
    """

    name: str
    measure: Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Tuning:
    """What the hook `bnb_tune` returns.

    Args:
        identity: of the device that is measured. To make it must be cheap: `bnb doctor` asks for it too.
        cases: those that matter most first, since time may be short. Making them must not use the device; measuring does.
    """

    identity: Identity
    cases: Sequence[Case]


@dataclass
class Table:
    """What was measured on a device: microseconds by case, and in it by path."""

    backend: str
    identity: Identity
    measured: str
    """When, in ISO 8601."""
    cases: Dict[str, Dict[str, float]] = field(default_factory=dict)

    def fastest(self, case: str) -> str:
        """Return the path of a case that took the least time."""
        times = self.cases[case]
        return min(times, key=lambda path: times[path])

    @property
    def file(self) -> Path:
        """Where the table is kept."""
        return table_file(self.backend, self.identity.device)


def tuning_of(entry: Entry, device: Optional[str] = None, shapes: Sequence[Tuple[int, int]] = ()) -> Optional[Tuning]:
    """Ask a loaded plugin what it can measure; None if it has no choice between paths.

    Args:
        entry: the plugin's.
        device: torch device, such as `"cuda:1"`; None for the plugin's first.
        shapes: rows and columns of weights to measure instead of the plugin's own list.

    Raises:
        BackendDefinitionError: the hook returned something else than a `Tuning`. What the hook itself raises passes.
    """
    found = entry.call("bnb_tune", device=device, shapes=tuple(shapes))
    if found is not None and not isinstance(found, Tuning):
        raise BackendDefinitionError(f"bnb_tune() of backend {entry.name!r} returned {found!r}; it must return a Tuning")
    return found


class Progress(NamedTuple):
    """How far `measure` is."""

    done: int
    total: int
    case: str


def cache_folder() -> Path:
    """Return the folder of tables: `BNB_TUNE_CACHE`, or one in the user's folder for caches."""
    chosen = os.environ.get("BNB_TUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("bnb-core", appauthor=False)) / "tune"


def table_file(backend: str, device: str) -> Path:
    """Return where the table of a backend's device is kept; different names have different files."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()[:60]
    return cache_folder() / f"{backend}-{readable}-{hashlib.sha256(device.encode()).hexdigest()[:8]}.json"


@lru_cache(maxsize=None)
def _table(backend: str, device: str, conditions: Any) -> Optional[Table]:
    return read(backend, Identity(device, dict(conditions)))


def table(backend: str, identity: Identity) -> Optional[Table]:
    """Return the table of a device, None if there is none that can be used. Read once, and again after `refresh`.

    Args:
        backend: its name.
        identity: as its hook `bnb_tune` gives it.
    """
    return _table(backend, identity.device, tuple(sorted(identity.conditions.items())))


def read(backend: str, identity: Identity) -> Optional[Table]:
    """Read the table of a device; None if there is none, or, with a warning, if it cannot be used here."""
    file = table_file(backend, identity.device)
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _pass_over(file, f"it cannot be read: {error.strerror or error}")
        return None
    try:
        found = _parsed(backend, text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        _pass_over(file, f"it is damaged ({type(error).__name__}: {error})")
        return None
    changed = _changes(found.identity, identity)
    if changed:
        _pass_over(file, f"it was measured with {changed}")
        return None
    return found


def _parsed(backend: str, text: bytes) -> Table:
    content = json.loads(text.decode())
    if content["format"] != FORMAT or content["backend"] != backend:
        raise ValueError(f"format {content['format']!r} of backend {content['backend']!r}, not {FORMAT} of {backend!r}")
    cases = {str(name): {str(path): float(took) for path, took in times.items()} for name, times in content["cases"].items()}
    for name, times in cases.items():
        if not times or not all(math.isfinite(took) and took > 0 for took in times.values()):
            raise ValueError(f"the times of {name!r} are {times}")
    identity = Identity(str(content["device"]), {str(key): str(value) for key, value in content["conditions"].items()})
    return Table(backend, identity, str(content["measured"]), cases)


def _changes(then: Identity, now: Identity) -> str:
    if then.device != now.device:
        return f"{then.device!r}, and the device is {now.device!r}"
    names = sorted({*then.conditions, *now.conditions})
    changed = [name for name in names if then.conditions.get(name) != now.conditions.get(name)]
    return ", ".join(
        f"{name} {then.conditions.get(name, 'unknown')} and not {now.conditions.get(name, 'unknown')}" for name in changed
    )


@lru_cache(maxsize=None)
def _pass_over(file: Path, reason: str) -> None:
    logger.warning("ignoring %s: %s; run `bnb tune` to measure again", file, reason)


def write(measured: Table) -> Path:
    """Write a table in the place of the one before, as a whole, and return its file.

    Raises:
        StorageError: the folder or the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "backend": measured.backend,
        "device": measured.identity.device,
        "conditions": dict(measured.identity.conditions),
        "measured": measured.measured,
        "cases": measured.cases,
    }
    file = measured.file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is complete: two that write at once must not mix.
        handle, name = tempfile.mkstemp(prefix=file.name, suffix=".part", dir=str(file.parent))
        try:
            with os.fdopen(handle, "w") as part:
                json.dump(content, part, indent=1)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise StorageError(
            f"the table cannot be written to {file}: {error.strerror or error}; set BNB_TUNE_CACHE to a folder that can be"
        ) from error
    forget()
    return file


def clear(backend: str, device: str) -> Optional[Path]:
    """Delete the table of a device, and return its file; None if there was none.

    Raises:
        StorageError: it cannot be deleted.
    """
    file = table_file(backend, device)
    try:
        file.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{file} cannot be deleted: {error.strerror or error}") from error
    forget()
    return file


def measure(
    backend: str,
    tuning: Tuning,
    seconds: float = math.inf,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Table:
    """Measure the cases of a device, as many as there is time for.

    Cases that an earlier table lacks come first, and those that are not measured now keep its times.

    Args:
        backend: its name.
        tuning: what its hook `bnb_tune` returned.
        seconds: no case begins that would end later, if it takes as long as the longest before it.
        progress: called before each case, and after the last.

    Raises:
        BackendDefinitionError: a case returned no times, or some that are not positive numbers.
    """
    earlier = read(backend, tuning.identity)
    cases = dict(earlier.cases) if earlier else {}
    todo = sorted(tuning.cases, key=lambda case: case.name in cases)
    start = time.monotonic()
    longest = 0.0
    done = 0
    for done, case in enumerate(todo):
        begun = time.monotonic()
        if begun + longest - start >= seconds:
            break
        progress(Progress(done, len(todo), case.name))
        cases[case.name] = _checked(case, backend)
        longest = max(longest, time.monotonic() - begun)
    else:
        done = len(todo)
    progress(Progress(done, len(todo), ""))
    return Table(backend, tuning.identity, datetime.now(timezone.utc).isoformat(timespec="seconds"), cases)


def _checked(case: Case, backend: str) -> Dict[str, float]:
    times = {path: float(took) for path, took in case.measure().items()}
    if not times or not all(math.isfinite(took) and took > 0 for took in times.values()):
        raise BackendDefinitionError(f"backend {backend!r} measured {times} for {case.name!r}; each path needs a positive time")
    return times


def missing(tuning: Tuning, found: Table) -> List[str]:
    """Name the cases that a table lacks."""
    return [case.name for case in tuning.cases if case.name not in found.cases]


def forget() -> None:
    """Read tables again when they are next needed."""
    _table.cache_clear()
    _pass_over.cache_clear()


registry.on_change.append(forget)
