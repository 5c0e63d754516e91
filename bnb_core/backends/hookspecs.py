"""Every hook that a plugin may implement. Only `bnb_backends` is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Mapping, Optional, Sequence, Tuple

import pluggy

if TYPE_CHECKING:
    from bnb_core.backends.api import Backend
    from bnb_core.backends.dispatch import Fallback
    from bnb_core.backends.doctor import Check
    from bnb_core.backends.tuning import Tuning

PROJECT_NAME = "bnb_core"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def bnb_backends() -> "Iterable[Backend]":
    """Return the backends of this plugin; each has an entry point of its name. Called once, when one is first needed."""
    raise NotImplementedError


@hookspec
def bnb_codebooks() -> Mapping[str, Sequence[float]]:
    """Return codebooks by name, 16 or 256 values each, that `quant_type` and `get_codebook` then accept."""
    raise NotImplementedError


@hookspec
def bnb_doctor() -> "Iterable[Check]":
    """Return `bnb_core.backends.doctor.Check` objects to show in `bnb doctor`."""
    raise NotImplementedError


@hookspec
def bnb_fallback(event: "Fallback") -> None:
    """Observe that an op ran on another backend than the preferred one. Called once for each distinct event."""
    raise NotImplementedError


@hookspec
def bnb_tune(device: Optional[str], shapes: Sequence[Tuple[int, int]]) -> "Tuning":
    """Return what `bnb tune` may measure on a device, for a backend that has several ways to run a call.

    Args:
        device: torch device, such as `"cuda:1"`; None for the plugin's first.
        shapes: rows and columns of weights to measure; where empty, those that the plugin thinks of.

    Raises:
        InvalidArgumentError: the plugin has no such device, or cannot take such a weight.
    """
    raise NotImplementedError
