"""Find backends through entry points, and load each one alone, so that a broken plugin harms nobody but itself.

The registry is the only state: a tuple of `Entry` records, replaced as a whole when it changes, so that readers need no lock.
An entry is loaded at most once, under its own lock; no lock is held that another plugin's import could wait for.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from enum import Enum
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from bnb_core.backends.api import Backend, Support
from bnb_core.errors import BackendDefinitionError, BackendError, BackendLoadError, BackendUnavailableError

if sys.version_info >= (3, 10):
    from importlib import metadata
else:
    import importlib_metadata as metadata

ENTRY_POINT_GROUP = "bnb_core.backends"
#: Only this distribution may provide the backend that all others fall back to.
REFERENCE_NAME, REFERENCE_DISTRIBUTION = "reference", "bnb-reference"

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
    """One backend name that some installed distribution provides, and what became of it.

    Attributes:
        name: the entry point's name, which is the backend's.
        distribution: the distribution's name and version, such as `"bnb-reference 0.1.0"`.
        state: see `State`. `reason` says why it is not `ready`; `error` is the exception, with its traceback, if there was one.
        backend: the backend, once loaded.
        plugin: the object that implements the hooks.
    """

    def __init__(self, name: str, distribution: str, load: Callable[[], Any]) -> None:
        self.name = name
        self.distribution = distribution
        self.state = State.DISCOVERED
        self.reason = ""
        self.error: Optional[BaseException] = None
        self.backend: Optional[Backend] = None
        self.plugin: Any = None
        self._load_plugin = load
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<{self.name} from {self.distribution}: {self.state}{': ' + self.reason if self.reason else ''}>"

    def load(self) -> Entry:
        """Import the plugin and ask it for its backend, once. Afterwards `state` is final; nothing is raised."""
        if self.state not in (State.DISCOVERED, State.LOADING):
            return self
        with self._lock:
            if self.state is State.LOADING:  # re-entered from the plugin's own import: the lock is ours already
                raise BackendLoadError(
                    f"backend {self.name!r} from {self.distribution} was used while it is being imported; "
                    "move that use out of the plugin's module level"
                )
            if self.state is State.DISCOVERED:
                self.state = State.LOADING
                try:
                    self._finish(*self._load())
                except Exception as error:
                    self.error = error
                    self._finish(State.BROKEN, f"{type(error).__name__}: {error}")
                except BaseException:
                    self.state = State.DISCOVERED  # interrupted, not broken: the next use tries again
                    raise
        return self

    def _finish(self, state: State, reason: str = "") -> None:
        self.reason = reason
        self.state = state

    def _load(self) -> Tuple[State, str]:
        self.plugin = self._load_plugin()
        backends = list(_call_hook(self.plugin, self.name, "bnb_backends") or ())
        for backend in backends:
            if not isinstance(backend, Backend):
                raise BackendDefinitionError(f"bnb_backends() returned {backend!r}; it must return Backend objects")
        named = [backend for backend in backends if backend.name == self.name]
        if not named:
            names = ", ".join(repr(backend.name) for backend in backends) or "none"
            raise BackendDefinitionError(
                f"entry point {self.name!r} provides no backend of that name (it provides {names}); give both the same name"
            )
        self.backend = named[0]
        compatible = self.backend.compatible
        if not compatible:
            return State.INCOMPATIBLE, compatible.reason
        available = self.backend.available()
        if not isinstance(available, Support):
            raise BackendDefinitionError(f"available() returned {available!r}; it must return YES or Support(False, reason)")
        return (State.READY, "") if available else (State.UNAVAILABLE, available.reason or "no reason given")

    def usable(self) -> Backend:
        """Return the backend, or raise the error that says why it cannot be had."""
        self.load()
        if self.state is State.READY and self.backend is not None:
            return self.backend
        who = f"backend {self.name!r} from {self.distribution}"
        if self.state is State.BROKEN:
            raise BackendLoadError(f"{who} is broken: {self.reason}") from self.error
        if self.state is State.INCOMPATIBLE:
            raise BackendLoadError(f"{who} is incompatible: {self.reason}")
        if self.state is State.UNAVAILABLE:
            raise BackendUnavailableError(f"{who} is unavailable: {self.reason}")
        raise BackendError(f"{who} is {self.state}: {self.reason}")


def _call_hook(plugin: Any, name: str, hook: str, **arguments: Any) -> Any:
    """Validate one plugin against the hookspecs and call one of its hooks; None if it does not implement that hook.

    Each plugin gets a manager of its own: pluggy stops a whole hook call, and a whole entry-point load, at the first plugin that
    raises.
    """
    import difflib

    import pluggy

    from bnb_core.backends import hookspecs

    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = [attribute for attribute in vars(hookspecs) if attribute.startswith("bnb_")]
        for attribute in dir(plugin):
            if attribute.startswith("bnb_") and attribute not in known and callable(getattr(plugin, attribute)):
                close = difflib.get_close_matches(attribute, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the hooks are {', '.join(known)}"
                raise BackendDefinitionError(f"unknown hook {attribute!r}; {hint}") from error
        raise
    results = getattr(manager.hook, hook)(**arguments)
    return results[0] if results else None


class Registry:
    """All the backends that this process knows of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: Optional[Tuple[Entry, ...]] = None
        self._registered: Tuple[Entry, ...] = ()
        self._reported: set[int] = set()
        #: Called after every change, so that caches of what was resolved can be dropped.
        self.on_change: List[Callable[[], None]] = []

    def entries(self) -> Tuple[Entry, ...]:
        """Return every entry, by name and distribution, without loading any."""
        entries = self._entries
        if entries is None:
            found = tuple(_discover())  # outside the lock: it reads files, and finds the same whoever does it
            with self._lock:
                if self._entries is None:
                    self._entries = _arrange(self._registered + found)
                entries = self._entries
        return entries

    def named(self, name: str) -> Tuple[Entry, ...]:
        """Return the entries of that name, the one that would be used first."""
        return tuple(sorted((e for e in self.entries() if e.name == name), key=lambda e: e.state is State.SHADOWED))

    def load_all(self) -> Tuple[Entry, ...]:
        """Load every entry that is not shadowed or blocked, and report each one that fails, once."""
        for entry in self.entries():
            entry.load()
            if entry.state in (State.BROKEN, State.INCOMPATIBLE, State.SHADOWED) and id(entry) not in self._reported:
                self._reported.add(id(entry))
                verb = "failed to import" if entry.state is State.BROKEN else f"is {entry.state}"
                logger.warning("backend %r (%s) %s: %s", entry.name, entry.distribution, verb, entry.reason)
                if entry.error is not None:
                    logger.debug("traceback of backend %r", entry.name, exc_info=entry.error)
        return self.entries()

    def ready(self) -> Tuple[Backend, ...]:
        """Load all, and return the backends that can run here: highest priority first, then by name."""
        backends = [e.backend for e in self.load_all() if e.state is State.READY and e.backend is not None]
        return tuple(sorted(backends, key=lambda backend: (-backend.priority, backend.name)))

    def plugins(self) -> Iterator[Tuple[str, Any]]:
        """Yield (name, plugin) of what has been loaded so far."""
        for entry in self.entries():
            if entry.plugin is not None and entry.state is not State.BROKEN:
                yield entry.name, entry.plugin

    def call_hook(self, hook: str, **arguments: Any) -> Iterator[Tuple[str, Any]]:
        """Call a hook on each loaded plugin alone, and yield (name, result). A plugin that raises is logged and left out."""
        for name, plugin in self.plugins():
            try:
                result = _call_hook(plugin, name, hook, **arguments)
            except Exception:
                logger.warning("hook %s of backend %r failed", hook, name, exc_info=True)
            else:
                if result is not None:
                    yield name, result

    def register(self, plugin: Any, name: Optional[str] = None) -> Entry:
        """Add a plugin of this process: an object with hooks, or a `Backend`. It shadows an installed one of the same name."""
        if isinstance(plugin, Backend):
            name, plugin = plugin.name, _BackendPlugin(plugin)
        if not name:
            raise BackendDefinitionError(f"register({plugin!r}) needs the name of the backend; pass name=...")
        entry = Entry(name, "registered in this process", lambda: plugin)
        self._replace(tuple(e for e in self._registered if e.name != name) + (entry,))
        return entry

    def unregister(self, name: str) -> None:
        """Remove a plugin that `register` added."""
        self._replace(tuple(e for e in self._registered if e.name != name))

    def refresh(self) -> None:
        """Forget what was discovered and read from the environment; the next use looks again."""
        self._replace(self._registered)

    def _replace(self, registered: Tuple[Entry, ...]) -> None:
        with self._lock:
            self._registered = registered
            self._entries = None
        for callback in self.on_change:
            callback()

    def after_fork(self) -> None:
        """Give the child locks of its own: a thread that held one does not exist there."""
        self._lock = threading.Lock()
        for entry in self._entries or ():
            entry._lock = threading.RLock()
            if entry.state is State.LOADING:
                entry.state = State.DISCOVERED


class _BackendPlugin:
    """The plugin around a backend that was registered directly."""

    def __init__(self, backend: Backend) -> None:
        from bnb_core.backends.hookspecs import hookimpl

        self.bnb_backends = hookimpl(lambda: [backend])


def _discover() -> Iterable[Entry]:
    seen: Dict[Tuple[str, str, str], Entry] = {}
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        distribution = getattr(point, "dist", None)
        name = distribution.metadata["Name"] if distribution is not None else "unknown distribution"
        label = f"{name} {distribution.version}" if distribution is not None else name
        # An editable install beside a regular one lists the same entry point twice: that is one plugin.
        seen.setdefault((point.name, name, point.value), Entry(point.name, label, point.load))
    return sorted(seen.values(), key=lambda entry: (entry.name, entry.distribution))


def _arrange(entries: Iterable[Entry]) -> Tuple[Entry, ...]:
    """Mark what may not be loaded: names that are disabled, taken, reserved or malformed."""
    disabled = disabled_names()
    first: Dict[str, Entry] = {}
    for entry in entries:
        local = entry.distribution == "registered in this process"
        reserved = entry.name == REFERENCE_NAME and not local and entry.distribution.split()[0] != REFERENCE_DISTRIBUTION
        if entry.name in disabled:
            entry._finish(State.BLOCKED, f"disabled by BNB_DISABLED_BACKENDS={os.environ.get('BNB_DISABLED_BACKENDS')}")
        elif not entry.name.isidentifier() or entry.name != entry.name.lower():
            entry._finish(State.BROKEN, f"the name {entry.name!r} is not a lower-case identifier")
        elif reserved:
            entry._finish(State.BROKEN, f"the name 'reference' is reserved for {REFERENCE_DISTRIBUTION}")
        elif entry.name in first:
            entry._finish(State.SHADOWED, f"{first[entry.name].distribution} provides a backend of the same name")
        else:
            if entry.state in (State.SHADOWED, State.BLOCKED):  # what stood in its way is gone
                entry._finish(State.DISCOVERED)
            first[entry.name] = entry
    return tuple(sorted(entries, key=lambda entry: (entry.name, entry.distribution)))


def disabled_names() -> Tuple[str, ...]:
    """Read `BNB_DISABLED_BACKENDS`, names separated by commas."""
    return tuple(name.strip() for name in os.environ.get("BNB_DISABLED_BACKENDS", "").split(",") if name.strip())


registry = Registry()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=registry.after_fork)
