"""Find backends through entry points, and load each one alone, so that a broken plugin harms nobody but itself.

The registry's state is one immutable `Snapshot`, replaced as a whole when something changes, so that readers need no lock. An entry
is loaded at most once, under its own lock; no lock is held that another plugin's import could wait for.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import threading
from enum import Enum
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from bnb_core.backends import environment
from bnb_core.backends.api import Backend, Support, incompatibility, is_backend_name
from bnb_core.errors import (
    BackendDefinitionError,
    BackendIncompatibleError,
    BackendLoadError,
    BackendNotFoundError,
    BackendUnavailableError,
)

if sys.version_info >= (3, 10):
    from importlib import metadata
else:  # the standard library's own is older than the interface used here
    import importlib_metadata as metadata

ENTRY_POINT_GROUP = "bnb_core.backends"
#: Only this package may provide the backend that all others fall back to.
REFERENCE_NAME, REFERENCE_PACKAGE = "reference", "bnb-reference"
#: How to get the backends of this project where they are missing.
INSTALL_HINTS: Mapping[str, str] = {
    "reference": "pip install bnb-core[reference]",
    "neon": "pip install bnb-cpu-neon",
    "jetson": "pip install bnb-cuda-jetson",
}

logger = logging.getLogger("bnb_core.backends")


class State(str, Enum):
    """Where a backend stands."""

    DISCOVERED = "discovered"
    LOADING = "loading"
    READY = "ready"
    UNAVAILABLE = "unavailable"
    INCOMPATIBLE = "incompatible"
    BROKEN = "broken"
    SHADOWED = "shadowed"
    BLOCKED = "blocked"

    def __str__(self) -> str:
        return self.value


class Entry:
    """One backend name that some installed package provides, and what became of it.

    Attributes:
        name: the entry point's name, which is the backend's.
        package: name of the distribution package; `distribution` is the same with its version, such as `"bnb-reference 0.1.0"`.
        state: see `State`. `reason` says why it is not `ready`; `error` is the exception, with its traceback, if there was one.
        backend: the backend, once loaded.
    """

    def __init__(self, name: str, package: str, version: str, load_plugin: Callable[[], Any]) -> None:
        self.name = name
        self.package = package
        self.distribution = f"{package} {version}".rstrip()
        self.state = State.DISCOVERED
        self.reason = ""
        self.error: Optional[BaseException] = None
        self.backend: Optional[Backend] = None
        self._load_plugin = load_plugin
        self._imported = False
        self._hooks: Any = None
        self._lock = threading.RLock()
        self._reported = False

    def __repr__(self) -> str:
        return f"<{self.name} from {self.distribution}: {self.state}{': ' + self.reason if self.reason else ''}>"

    def load(self) -> Entry:
        """Import the plugin and ask it for its backend, once. Whatever fails is recorded in `state`, `reason` and `error`.

        Raises:
            BackendLoadError: the plugin's own import came here.
        """
        if self.state not in (State.DISCOVERED, State.LOADING):
            return self
        with self._lock:
            if self.state is State.LOADING:  # nobody else can hold the lock: this is the same thread
                raise BackendLoadError(
                    f"backend {self.name!r} from {self.distribution} was used while it is being imported; "
                    "move that use out of the plugin's module level"
                )
            if self.state is State.DISCOVERED:
                self.state = State.LOADING
                try:
                    self.settle(*self._load())
                except BackendIncompatibleError as error:
                    self.settle(State.INCOMPATIBLE, incompatibility(error.api_version, self.package))
                except Exception as error:
                    self.settle(State.BROKEN, describe(error), error)
                except BaseException:
                    self.state = State.DISCOVERED  # interrupted, not broken: the next use tries again
                    raise
        return self

    def settle(self, state: State, reason: str = "", error: Optional[BaseException] = None) -> None:
        """Record what became of the entry; the state last, because readers look at it without a lock."""
        self.reason = reason
        self.error = error
        self.state = state

    def _load(self) -> Tuple[State, str]:
        plugin = self._load_plugin()
        self._imported = True
        self._hooks = _validated_hooks(plugin, self.name)
        backends = self.call("bnb_backends")
        if backends is None:
            raise BackendDefinitionError("it implements no hook bnb_backends; is the function there, and decorated with @hookimpl?")
        by_name = {}
        for backend in backends:
            if not isinstance(backend, Backend):
                raise BackendDefinitionError(f"bnb_backends() returned {backend!r}; it must return Backend objects")
            by_name[backend.name] = backend
        if self.name not in by_name:
            names = ", ".join(map(repr, by_name)) or "none"
            raise BackendDefinitionError(
                f"entry point {self.name!r} provides no backend of that name (it provides {names}); give both the same name"
            )
        backend = by_name[self.name]
        available = backend.available()
        if not isinstance(available, Support):
            raise BackendDefinitionError(f"available() returned {available!r}; it must return YES or Support(False, reason)")
        self.backend = backend
        return (State.READY, "") if available else (State.UNAVAILABLE, available.reason)

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook of the plugin, once loaded; None if the plugin does not implement it."""
        results = getattr(self._hooks, hook)(**arguments)
        return results[0] if results else None

    def usable(self) -> Backend:
        """Return the backend, or raise the error that says why it cannot be had."""
        self.load()
        if self.state is State.READY and self.backend is not None:
            return self.backend
        message = f"backend {self.name!r} from {self.distribution} is {self.state}: {self.reason}"
        if self.state in (State.UNAVAILABLE, State.BLOCKED):
            raise BackendUnavailableError(message)
        raise BackendLoadError(message) from self.error

    def report(self) -> None:
        """Log, once, that nobody asked for this backend by name but that it would have been used if it were all right."""
        with self._lock:
            known, self._reported = self._reported, True
        if known or self.state not in (State.BROKEN, State.INCOMPATIBLE, State.SHADOWED):
            return
        what = "failed to import" if self.state is State.BROKEN and self.error and not self._imported else f"is {self.state}"
        logger.warning("backend %r (%s) %s: %s", self.name, self.distribution, what, self.reason)
        if self.error is not None:
            logger.debug("traceback of backend %r", self.name, exc_info=self.error)

    def after_fork(self) -> None:
        """Make the entry usable in a forked child, where no other thread goes on and an import that it had begun never ends."""
        if self.state is State.LOADING:
            # Python's own lock on the half-imported module stays taken, so that another attempt would hang. If it is the import
            # itself that forked, it goes on here too and settles the entry once more.
            self.settle(
                State.BROKEN,
                "another thread was loading it when this process was forked; load it earlier, or start processes with 'spawn'",
            )
        self._lock = threading.RLock()


def describe(error: BaseException) -> str:
    """Say what an exception says, with its type."""
    return f"{type(error).__name__}: {error}"


def _validated_hooks(plugin: Any, name: str) -> Any:
    """Check a plugin against the hookspecs, and return pluggy's relay to its hooks.

    Each plugin gets a manager of its own: pluggy stops a whole hook call, and a whole entry-point load, at the first plugin that
    raises.
    """
    import pluggy

    from bnb_core.backends import hookspecs

    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    known = [attribute for attribute in vars(manager.hook) if attribute.startswith("bnb_")]
    manager.register(plugin, name=name)
    for caller in manager.get_hookcallers(plugin) or ():
        if caller.name not in known and not all(hook.optionalhook for hook in caller.get_hookimpls()):
            close = difflib.get_close_matches(caller.name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the hooks are {', '.join(known)}"
            raise BackendDefinitionError(f"unknown hook {caller.name!r}; {hint}")
    return manager.hook


class Snapshot(NamedTuple):
    """What was found at one time."""

    entries: Tuple[Entry, ...]
    """Sorted by name, then package."""
    by_name: Mapping[str, Entry]
    """The entry that counts for each name."""
    unreadable: Tuple[str, ...]
    """Packages whose metadata could not be read, each with the reason."""


class Registry:
    """All the backends that this process knows of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshot: Optional[Snapshot] = None
        self._registered: Mapping[str, Any] = {}
        #: Called after every change, so that caches of what was resolved can be dropped.
        self.on_change: List[Callable[[], None]] = []

    def snapshot(self) -> Snapshot:
        """Return what is installed and registered; looks at the first call only, and loads nothing."""
        snapshot = self._snapshot
        if snapshot is None:
            with self._lock:
                snapshot = self._snapshot
                if snapshot is None:
                    snapshot = self._snapshot = _take_snapshot(self._registered)
        return snapshot

    def entries(self) -> Tuple[Entry, ...]:
        """Return every entry, by name and package, without loading any."""
        return self.snapshot().entries

    def entry(self, name: str) -> Entry:
        """Return the entry that counts for this name.

        Raises:
            BackendNotFoundError: there is none; the message suggests what may be meant.
        """
        by_name = self.snapshot().by_name
        if name in by_name:
            return by_name[name]
        if name in INSTALL_HINTS:
            raise BackendNotFoundError(f"backend {name!r} is not installed; {INSTALL_HINTS[name]}")
        close = difflib.get_close_matches(name.lower(), {*by_name, *INSTALL_HINTS}, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        installed = ", ".join(sorted(by_name)) or "none"
        raise BackendNotFoundError(f"no backend named {name!r}; {hint}Installed: {installed}. Run `bnb doctor` for details.")

    def backend(self, name: str) -> Backend:
        """Return a backend that was asked for by name.

        Raises:
            BackendNotFoundError, BackendLoadError, BackendUnavailableError: it cannot be had.
        """
        entry = self.entry(name)
        rivals = [e.distribution for e in self.entries() if e.name == name and e.state is State.SHADOWED]
        if rivals and name not in self._registered:
            raise BackendLoadError(
                f"{len(rivals) + 1} packages provide backend {name!r}: {', '.join([entry.distribution, *rivals])}; "
                "there should be only one, so uninstall the others"
            )
        return entry.usable()

    def load_all(self) -> Tuple[Entry, ...]:
        """Load every entry that may be loaded, and log each one that fails, once."""
        for entry in self.entries():
            entry.load()
            entry.report()
        return self.entries()

    def ready(self) -> Tuple[Backend, ...]:
        """Load all, and return the backends that can run here: highest priority first, then by name."""
        backends = [e.backend for e in self.load_all() if e.state is State.READY and e.backend is not None]
        return tuple(sorted(backends, key=lambda backend: (-backend.priority, backend.name)))

    def origin(self, backend: Backend) -> str:
        """Name the distribution that a backend comes from."""
        return next((entry.distribution for entry in self.entries() if entry.backend is backend), "this process")

    def call_hook(self, hook: str, **arguments: Any) -> List[Tuple[str, Any]]:
        """Call a hook on each loaded plugin alone, and list (name, result). A plugin that raises is logged and left out."""
        results = []
        for entry in self.entries():
            if entry.state not in (State.READY, State.UNAVAILABLE):
                continue
            try:
                result = entry.call(hook, **arguments)
            except Exception:
                logger.warning("hook %s of backend %r failed", hook, entry.name, exc_info=True)
            else:
                if result is not None:
                    results.append((entry.name, result))
        return results

    def register(self, plugin: Any, name: Optional[str] = None) -> None:
        """Add a plugin to this process: a `Backend`, or an object with hooks and the name of its backend.

        It takes the place of an installed one of the same name.

        Raises:
            BackendDefinitionError: the name is missing or is no lower-case identifier.
        """
        if isinstance(plugin, Backend):
            name, plugin = plugin.name, _BackendPlugin(plugin)
        if name is None or not is_backend_name(name):
            raise BackendDefinitionError(f"register({plugin!r}, name={name!r}) needs the backend's name; pass one such as 'acme'")
        self._replace({**self._registered, name: plugin})

    def unregister(self, name: str) -> None:
        """Remove a plugin that `register` added.

        Raises:
            BackendNotFoundError: none of that name was registered.
        """
        if name not in self._registered:
            raise BackendNotFoundError(f"no backend named {name!r} was registered in this process; nothing to unregister")
        self._replace({key: plugin for key, plugin in self._registered.items() if key != name})

    def refresh(self) -> None:
        """Forget what was found and read from the environment; the next use looks again."""
        self._replace(self._registered)

    def _replace(self, registered: Mapping[str, Any]) -> None:
        with self._lock:
            self._registered = registered
            self._snapshot = None
        for callback in self.on_change:
            callback()

    def after_fork(self) -> None:
        """Give the child locks of its own: a thread that held one does not exist there."""
        self._lock = threading.Lock()
        for entry in self._snapshot.entries if self._snapshot is not None else ():
            entry.after_fork()


class _BackendPlugin:
    """The plugin around a backend that was registered directly."""

    def __init__(self, backend: Backend) -> None:
        from bnb_core.backends.hookspecs import hookimpl

        self.bnb_backends = hookimpl(lambda: [backend])


def _itself(plugin: Any) -> Any:
    return plugin


def _take_snapshot(registered: Mapping[str, Any]) -> Snapshot:
    installed, unreadable = _discover()
    entries = [Entry(name, "this process", "", partial(_itself, plugin)) for name, plugin in registered.items()]
    by_name: Dict[str, Entry] = {entry.name: entry for entry in entries}
    rejected: Dict[str, Entry] = {}
    disabled = environment.names("BNB_DISABLED_BACKENDS")
    for entry in installed:
        if entry.name in disabled:
            entry.settle(State.BLOCKED, f"disabled by BNB_DISABLED_BACKENDS={','.join(disabled)}")
        elif not is_backend_name(entry.name):
            entry.settle(State.BROKEN, f"the name {entry.name!r} is not a lower-case identifier")
        elif entry.name == REFERENCE_NAME and _canonical(entry.package) != REFERENCE_PACKAGE:
            entry.settle(State.BROKEN, f"the name {REFERENCE_NAME!r} is reserved for {REFERENCE_PACKAGE}")
        elif entry.name in by_name:
            entry.settle(State.SHADOWED, f"{by_name[entry.name].distribution} provides a backend of the same name")
            entry._reported = entry.name in registered  # somebody wanted that; two installed packages are an accident
        else:
            by_name[entry.name] = entry
            continue
        rejected.setdefault(entry.name, entry)
    return Snapshot(
        tuple(sorted([*entries, *installed], key=lambda entry: (entry.name, entry.distribution))),
        {**rejected, **by_name},
        unreadable,
    )


def _discover() -> Tuple[List[Entry], Tuple[str, ...]]:
    """Read the entry points of each installed package alone: one with unreadable metadata must not hide the others."""
    found: Dict[Tuple[str, str], Entry] = {}
    unreadable = []
    for distribution in metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
        except Exception as error:
            unreadable.append(f"entry points of a package in {distribution.locate_file('')} cannot be read: {describe(error)}")
            logger.info("%s", unreadable[-1])
            continue
        package, version = _identity(distribution) if points else ("", "")
        for point in points:
            # An editable install beside a regular one lists the same package twice: Python imports the first.
            found.setdefault((point.name, _canonical(package)), Entry(point.name, package, version, point.load))
    return sorted(found.values(), key=lambda entry: (entry.name, entry.distribution)), tuple(unreadable)


def _identity(distribution: Any) -> Tuple[str, str]:
    try:
        return distribution.metadata["Name"] or "unknown package", distribution.version or ""
    except Exception:  # no METADATA file, or garbage in it; the plugin itself may still be fine
        return "unknown package", ""


def _canonical(package: str) -> str:
    """Spell a package's name the way that PEP 503 compares them."""
    return re.sub(r"[-_.]+", "-", package).lower()


registry = Registry()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=registry.after_fork)
