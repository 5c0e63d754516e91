"""How exactly 4-bit linear layers are computed: within the bounds that every backend keeps, or in int8, faster."""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Iterator, Optional

from bnb_core.errors import ConfigurationError

#: The first is that of whoever asks for nothing.
PRECISIONS = ("exact", "fast")

_context: ContextVar[Optional[str]] = ContextVar("bnb_neon_precision", default=None)
_process: Optional[str] = None
_environment = PRECISIONS[0]


def current_precision() -> str:
    """Return the precision in force here: "exact" or "fast"."""
    return _context.get() or _process or _environment


@contextmanager
def use_precision(precision: str) -> Iterator[None]:
    """Compute the 4-bit linear layers of this context in this precision.

    "fast" rounds activations to int8, with a scale for each block as long as the weight's, and the weight's codebook as well; the
    backend's README says what that costs and brings. It is used by the ops `gemm_4bit` and `grouped_gemm_4bit` where the
    weight's rows consist of whole blocks. Gradients, every other op, and other backends are as exact as ever.

    The choice holds for the current thread or asynchronous task; a new thread starts with that of the process. Inside a function
    compiled with `fullgraph=True` this cannot be used: put it around the call.

    Args:
        precision: "exact" or "fast".

    Raises:
        ConfigurationError: it is neither.
    """
    token = _context.set(_checked(precision, "use_precision"))
    try:
        yield
    finally:
        _context.reset(token)


def set_precision(precision: Optional[str]) -> None:
    """Compute the 4-bit linear layers of this process in this precision, but for contexts of `use_precision`.

    Args:
        precision: "exact" or "fast"; None for what `BNB_NEON_PRECISION` says.

    Raises:
        ConfigurationError: it is something else; the former choice stays.
    """
    global _process
    _process = None if precision is None else _checked(precision, "set_precision")


def read_environment() -> None:
    """Read `BNB_NEON_PRECISION`; without it, products are exact.

    Raises:
        ConfigurationError: it is neither "exact" nor "fast".
    """
    global _environment
    value = os.environ.get("BNB_NEON_PRECISION") or PRECISIONS[0]
    if value not in PRECISIONS:
        raise ConfigurationError(
            f"BNB_NEON_PRECISION={value!r} is not one of {', '.join(PRECISIONS)}; set one of these or unset it"
        )
    _environment = value


def _checked(precision: str, caller: str) -> str:
    if precision not in PRECISIONS:
        raise ConfigurationError(f"{caller}({precision!r}): there is no such precision; pass {' or '.join(map(repr, PRECISIONS))}")
    return precision
