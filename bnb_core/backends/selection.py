"""Which backends may run an op, and in what order: the environment, `set_backend`, `use_backend`, or priorities.

Strongest first: `use_backend` (this context), `set_backend` (this process), `BNB_BACKEND`, then the available backends by priority.
What is chosen explicitly fails loudly; what is found automatically degrades with one warning.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Dict, Iterator, Optional, Tuple, Union

from bnb_core.backends import environment, hardware
from bnb_core.backends.api import Backend
from bnb_core.backends.discovery import INSTALL_HINTS, REFERENCE_NAME, Entry, State, registry
from bnb_core.errors import BackendError, BackendNotFoundError, ConfigurationError

logger = logging.getLogger("bnb_core.backends")


class Selection:
    """The backends that were asked for, if any, and by whom. Compared by identity."""

    __slots__ = ("names", "source")

    def __init__(self, names: Tuple[str, ...], source: str) -> None:
        self.names = names
        self.source = source

    def __repr__(self) -> str:
        return f"<Selection {', '.join(self.names) or 'automatic'} ({self.source})>"

    def chain(self, device_type: str) -> Tuple[Backend, ...]:
        """Return the backends to try for tensors of this device type, in order.

        Raises:
            BackendError: one that was named is missing, broken, unavailable or ambiguous; or none is usable at all.
            ConfigurationError: `BNB_FALLBACK` has a value that is not accepted.
        """
        strict = fallback_policy() == "never"
        if not self.names:
            covering = tuple(backend for backend in _ready() if backend.covers(device_type))
            return covering[:1] if strict else covering
        chain = tuple(self._named(name) for name in self.names)
        if strict or REFERENCE_NAME in self.names:
            return chain
        return chain + _last_resort()

    def first(self) -> Backend:
        """Return the backend that is tried first, on whatever device.

        Raises:
            BackendError: it cannot be had.
        """
        return self._named(self.names[0]) if self.names else _ready()[0]

    def _named(self, name: str) -> Backend:
        try:
            return registry.backend(name)
        except BackendError as error:
            if not self.source.startswith("BNB_BACKEND"):
                raise
            # Nothing in the program asked for it, so the message has to say who did.
            raise type(error)(f"BNB_BACKEND={','.join(self.names)!r}: {error}") from error.__cause__


def _ready() -> Tuple[Backend, ...]:
    ready = registry.ready()
    entries = registry.entries()
    if not entries:
        raise BackendNotFoundError(f"no backend installed; {INSTALL_HINTS[REFERENCE_NAME]}")
    if not ready:
        reasons = "".join(f"\n  {entry.name} ({entry.distribution}): {entry.state}, {entry.reason}" for entry in entries)
        raise BackendNotFoundError(f"no installed backend can run here; {INSTALL_HINTS[REFERENCE_NAME]}{reasons}")
    missing = hardware.missing_backend(entries)
    if missing:
        _inform_once(missing)
    return ready


@lru_cache(maxsize=None)
def _inform_once(message: str) -> None:
    logger.info(message)


def _last_resort() -> Tuple[Backend, ...]:
    entry = registry.snapshot().by_name.get(REFERENCE_NAME)
    if entry is None:
        return ()
    entry.load()
    entry.report()
    return (entry.backend,) if entry.state is State.READY and entry.backend is not None else ()


_interned: Dict[Tuple[Tuple[str, ...], str], Selection] = {}
_context: ContextVar[Optional[Selection]] = ContextVar("bnb_backend", default=None)
_process: Optional[Selection] = None
_environment: Optional[Selection] = None


def _intern(names: Tuple[str, ...], source: str) -> Selection:
    return _interned.setdefault((names, source), Selection(names, source))


def current() -> Selection:
    """Return the selection in force."""
    return _context.get() or _process or _environment or _read_environment()


def _read_environment() -> Selection:
    global _environment
    names = environment.names("BNB_BACKEND")
    _environment = selection = _intern(names, f"BNB_BACKEND={','.join(names)}" if names else "priority")
    return selection


@contextmanager
def pinned(selection: Selection) -> Iterator[None]:
    """Use a selection taken earlier: an eager backward runs where its forward ran, also on another thread."""
    token = _context.set(selection)
    try:
        yield
    finally:
        _context.reset(token)


@contextmanager
def use_backend(*backends: Union[str, Backend]) -> Iterator[None]:
    """Run the ops of this context on these backends, tried in order; `reference` follows unless `BNB_FALLBACK=never`.

    The choice holds for the current thread or asynchronous task; a new thread starts with the choice of the process. A compiled
    graph chooses each time it runs, by the thread that it runs on. Inside a function compiled with `fullgraph=True` this cannot be
    used: put it around the call.

    Args:
        backends: names, or backends as `get_backend` returns them.

    Raises:
        BackendNotFoundError, BackendLoadError, BackendUnavailableError: a backend cannot be had.
        ConfigurationError: no backend is given, or something that is neither a name nor a backend in use.
    """
    with pinned(_checked(backends, "use_backend")):
        yield


def set_backend(*backends: Union[str, Backend]) -> None:
    """Run the ops of this process on these backends, tried in order; without arguments, choose by environment and priority again.

    Args:
        backends: names, or backends as `get_backend` returns them.

    Raises:
        BackendNotFoundError, BackendLoadError, BackendUnavailableError: a backend cannot be had; the former choice stays.
        ConfigurationError: something is neither a name nor a backend in use; the former choice stays.
    """
    global _process
    _process = _checked(backends, "set_backend") if backends else None


def get_backend(name: Optional[str] = None) -> Backend:
    """Return a backend by name, or the one that is tried first.

    Raises:
        BackendNotFoundError, BackendLoadError, BackendUnavailableError: it cannot be had.
    """
    return current().first() if name is None else registry.backend(name)


def list_backends() -> Tuple[Entry, ...]:
    """Return a record of each backend found, with its `name`, `distribution`, `state` and `reason`. Loads none."""
    return registry.entries()


def refresh() -> None:
    """Look for installed backends again, and read `BNB_BACKEND`, `BNB_FALLBACK` and `BNB_DISABLED_BACKENDS` again."""
    registry.refresh()


def _checked(backends: Tuple[Union[str, Backend], ...], caller: str) -> Selection:
    """Select these backends, after making sure that each can be had."""
    names = []
    for backend in backends:
        name = backend.name if isinstance(backend, Backend) else backend
        if not isinstance(name, str):
            raise ConfigurationError(f"{caller}({name!r}): pass backend names one by one, such as {caller}('neon', 'reference')")
        if registry.backend(name) is not backend and isinstance(backend, Backend):
            raise ConfigurationError(f"{caller}({backend!r}): another backend is in use under this name; register() yours first")
        names.append(name)
    if not names:
        raise ConfigurationError(f"{caller}() needs a backend name, such as {caller}('reference')")
    return _intern(tuple(names), f"{caller}({', '.join(map(repr, names))})")


@lru_cache(maxsize=None)
def fallback_policy() -> str:
    """Return what `BNB_FALLBACK` says; like every variable it is read once, and again after `refresh`."""
    return environment.fallback_policy()


def _forget_environment() -> None:
    global _environment
    _environment = None
    fallback_policy.cache_clear()


registry.on_change.append(_forget_environment)
