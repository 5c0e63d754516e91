"""Which backends may run an op, and in what order: the environment, `set_backend`, `use_backend`, or priorities.

Strongest first: `use_backend` (this context), `set_backend` (this process), `BNB_BACKEND`, then the available backends by priority.
What is chosen explicitly fails loudly; what is found automatically degrades with one warning.
"""

from __future__ import annotations

import difflib
import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Dict, Iterator, Optional, Tuple, Union

from bnb_core.backends.api import Backend
from bnb_core.backends.discovery import REFERENCE_NAME, Entry, State, registry
from bnb_core.errors import BackendError, BackendNotFoundError, ConfigurationError

FALLBACK_POLICIES = ("warn", "allow", "never")

#: Environment variables that bnb_core and its own backends read. `bnb doctor` reports any other `BNB_*`.
ENVIRONMENT_VARIABLES = {
    "BNB_BACKEND": "names of the backends to use, in order, separated by commas",
    "BNB_FALLBACK": "warn (default), allow or never: what happens when a backend cannot run an op",
    "BNB_DISABLED_BACKENDS": "names of installed backends not to load, separated by commas",
    "BNB_NEON_FEATURES": "CPU features that bnb-cpu-neon may use",
    "BNB_NEON_PRECISION": "exact (default) or fast: how bnb-cpu-neon multiplies",
}

#: How to get the backends of this project where they are missing.
INSTALL_HINTS = {
    "reference": "pip install bnb-core[reference]",
    "neon": "pip install bnb-cpu-neon",
    "jetson": "pip install bnb-cuda-jetson",
}


class Selection:
    """The backends that were asked for, by whom, and what to do where they cannot run an op. Compared by identity."""

    __slots__ = ("fallback", "names", "source")

    def __init__(self, names: Tuple[str, ...], source: str, fallback: str) -> None:
        self.names = names
        self.source = source
        self.fallback = fallback

    def __repr__(self) -> str:
        return f"<Selection {', '.join(self.names) or 'automatic'} ({self.source}), fallback: {self.fallback}>"

    def chain(self, device_type: str) -> Tuple[Backend, ...]:
        """Return the backends to try for tensors of this device type, in order.

        Raises:
            BackendError: one that was named is missing, broken, unavailable or ambiguous; or none is installed at all.
        """
        if self.names:
            chain = tuple(_require(name, self.source) for name in self.names)
            if self.fallback != "never" and REFERENCE_NAME not in self.names:
                chain += tuple(backend for backend in _ready(REFERENCE_NAME))
            return chain
        ready = registry.ready()
        if not ready:
            raise BackendNotFoundError(f"no backend can run here; {INSTALL_HINTS[REFERENCE_NAME]}, or see `bnb doctor`")
        covering = tuple(backend for backend in ready if backend.covers(device_type))
        return covering[:1] if self.fallback == "never" else covering


_interned: Dict[Tuple[Tuple[str, ...], str, str], Selection] = {}
_context: ContextVar[Optional[Selection]] = ContextVar("bnb_backend", default=None)
_process: Optional[Tuple[str, ...]] = None
_default: Optional[Selection] = None


def _intern(names: Tuple[str, ...], source: str) -> Selection:
    fallback = _fallback_policy()
    return _interned.setdefault((names, source, fallback), Selection(names, source, fallback))


def _fallback_policy() -> str:
    policy = os.environ.get("BNB_FALLBACK", "warn")
    if policy not in FALLBACK_POLICIES:
        raise ConfigurationError(
            f"BNB_FALLBACK={policy!r} is not one of {', '.join(FALLBACK_POLICIES)}; set one of these or unset it"
        )
    return policy


def current() -> Selection:
    """Return the selection in force. The environment is read once; `refresh()` reads it again."""
    return _context.get() or process_selection()


def process_selection() -> Selection:
    """Return the selection outside every `use_backend`: `set_backend`, `BNB_BACKEND`, or automatic."""
    global _default
    selection = _default
    if selection is None:
        if _process is not None:
            selection = _intern(_process, f"set_backend({', '.join(map(repr, _process))})")
        else:
            value = os.environ.get("BNB_BACKEND", "")
            names = tuple(name.strip() for name in value.split(",") if name.strip())
            selection = _intern(names, f"BNB_BACKEND={value}" if names else "automatic")
        _default = selection
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

    The choice holds for the current thread or task. A new thread starts with the process's choice, and so does a compiled graph
    each time it runs. Inside a function compiled with `fullgraph=True` it cannot be used: put it around the call.

    Raises:
        BackendNotFoundError, BackendLoadError, BackendUnavailableError: a backend cannot be had.
    """
    names = _checked_names(backends)
    selection = _intern(names, f"use_backend({', '.join(map(repr, names))})")
    selection.chain("cpu")
    with pinned(selection):
        yield


def set_backend(*backends: Union[str, Backend]) -> None:
    """Run the ops of this process on these backends, tried in order; without arguments, choose by environment and priority again.

    Raises:
        BackendNotFoundError, BackendLoadError, BackendUnavailableError: a backend cannot be had; the former choice stays.
    """
    global _process, _default
    if backends:
        names = _checked_names(backends)
        _intern(names, f"set_backend({', '.join(map(repr, names))})").chain("cpu")
        _process = names
    else:
        _process = None
    _default = None


def get_backend(name: Optional[str] = None) -> Backend:
    """Return a backend by name, or the one that is tried first.

    Raises:
        BackendNotFoundError, BackendLoadError, BackendUnavailableError: it cannot be had.
    """
    if name is not None:
        return _require(name, "")
    selection = current()
    if selection.names:
        return _require(selection.names[0], selection.source)
    ready = registry.ready()
    if not ready:
        raise BackendNotFoundError(f"no backend can run here; {INSTALL_HINTS[REFERENCE_NAME]}, or see `bnb doctor`")
    return ready[0]


def list_backends() -> Tuple[Entry, ...]:
    """Return a record of each backend found, with its `name`, `distribution`, `state` and `reason`. Loads none."""
    return registry.entries()


def refresh() -> None:
    """Look for installed backends again, and read the `BNB_*` variables again."""
    registry.refresh()


def _forget() -> None:
    global _default
    _default = None


registry.on_change.append(_forget)


def _checked_names(backends: Tuple[Union[str, Backend], ...]) -> Tuple[str, ...]:
    if not backends:
        raise ConfigurationError("use_backend() needs at least one backend name, such as use_backend('reference')")
    return tuple(backend.name if isinstance(backend, Backend) else backend for backend in backends)


def _ready(name: str) -> Iterator[Backend]:
    for entry in registry.named(name)[:1]:
        if entry.state not in (State.BLOCKED, State.SHADOWED) and entry.load().state is State.READY:
            assert entry.backend is not None
            yield entry.backend


def _require(name: str, source: str) -> Backend:
    """Return a backend that was asked for by name; `source` says by whom, for the error."""
    asked = f"{source}: " if source and not source.startswith("use_backend") else ""
    entries = registry.named(name)
    if not entries:
        raise BackendNotFoundError(asked + _not_found(name))
    distributions = [entry.distribution for entry in entries]
    if len(entries) > 1 and not distributions[0].startswith("registered"):
        raise BackendError(
            f"{asked}{len(entries)} packages provide backend {name!r}: {', '.join(distributions)}; uninstall all but one"
        )
    try:
        return entries[0].usable()
    except BackendError as error:
        if not asked:
            raise
        raise type(error)(f"{asked}{error}") from error.__cause__


def _not_found(name: str) -> str:
    installed = sorted({entry.name for entry in registry.entries()})
    if name in INSTALL_HINTS:
        return f"backend {name!r} is not installed; {INSTALL_HINTS[name]}"
    close = difflib.get_close_matches(str(name), installed + list(INSTALL_HINTS), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"no backend named {name!r}; {hint}Installed: {', '.join(installed) or 'none'}. Run `bnb doctor` for details."
