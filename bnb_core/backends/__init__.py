"""Who runs an op: the API that backends are written with, and the functions that choose between them."""

from bnb_core.backends.api import ANY_DEVICE, YES, Backend, Call, Kernel, Support
from bnb_core.backends.discovery import Entry, State, registry
from bnb_core.backends.dispatch import BackendFallbackWarning, Fallback, fallbacks, reset_fallbacks
from bnb_core.backends.hookspecs import hookimpl
from bnb_core.backends.selection import get_backend, list_backends, refresh, set_backend, use_backend
from bnb_core.ops.spec import API_VERSION

register = registry.register
unregister = registry.unregister

__all__ = [
    "ANY_DEVICE",
    "API_VERSION",
    "YES",
    "Backend",
    "BackendFallbackWarning",
    "Call",
    "Entry",
    "Fallback",
    "Kernel",
    "State",
    "Support",
    "fallbacks",
    "get_backend",
    "hookimpl",
    "list_backends",
    "refresh",
    "register",
    "reset_fallbacks",
    "set_backend",
    "unregister",
    "use_backend",
]
