"""Find the kernel for one call, and keep count of where another than the preferred backend had to run it.

What can be known without the call (which backends, devices, dtypes) is worked out once for each (op, device, dtype, selection) and
cached as a `Plan`. A call on a plan without fallbacks and without `when` costs one dictionary look-up.
"""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Tuple

from bnb_core.backends import selection as _selection
from bnb_core.backends.api import Backend, Call, Kernel, dtype_name
from bnb_core.backends.discovery import registry
from bnb_core.backends.selection import Selection
from bnb_core.errors import OpNotSupportedError
from bnb_core.ops.spec import OpSpec

if TYPE_CHECKING:
    import torch


class BackendFallbackWarning(UserWarning):
    """An op ran on another backend than the preferred one. Given once for each op, device, dtype and reason."""


@dataclass(frozen=True)
class Fallback:
    """That an op ran on the backend `chosen` because `preferred` refused it."""

    op: str
    device: str
    dtype: str
    preferred: str
    chosen: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} on {self.device} {self.dtype}: {self.preferred} -> {self.chosen} ({self.reason})"


class Step(NamedTuple):
    """One backend of a selection, and what it says to an op on a device type and dtype."""

    backend: str
    kernel: Optional[Kernel]
    refusal: str
    """Why it runs no such call; empty if its kernel may."""


class Plan:
    """What is known about an (op, device type, dtype, selection) before any call.

    Attributes:
        steps: the backends to try, in order.
        direct: the kernel that runs every such call, if the call need not be looked at.
    """

    __slots__ = ("direct", "steps")

    def __init__(self, spec: OpSpec, device_type: str, dtype: str, selection: Selection) -> None:
        self.steps = tuple(_step(spec, device_type, dtype, backend) for backend in selection.chain(device_type))
        self.direct: Optional[Kernel] = None
        for position, (backend, kernel, refusal) in enumerate(self.steps):
            if kernel is not None and not refusal:
                if kernel.unconditional and (position == 0 or backend in selection.names):
                    self.direct = kernel
                break


def _step(spec: OpSpec, device_type: str, dtype: str, backend: Backend) -> Step:
    kernel = backend.kernels.get(spec.name)
    return Step(backend.name, kernel, "does not implement it" if kernel is None else kernel.refusal(device_type, dtype))


_plans: Dict[Tuple[str, Any, Any, Selection], Plan] = {}
_counts: Dict[Fallback, int] = {}
_lock = threading.Lock()


def resolve(spec: OpSpec, device: "torch.device", dtype: "torch.dtype", args: Tuple[Any, ...]) -> Kernel:
    """Return the kernel that runs this call.

    Args:
        spec: the op.
        device: device of the argument that the spec dispatches by.
        dtype: the dtype that the spec dispatches by.
        args: the op's arguments, complete and in the spec's order.

    Raises:
        OpNotSupportedError: every selected backend refuses; the message lists each with its reason.
        BackendError: a backend that was asked for by name cannot be had, or none can.
        ConfigurationError: `BNB_FALLBACK` has a value that is not accepted.
    """
    selection = _selection.current()
    plans = _plans  # a refresh begins a new table, so that what a slower thread adds to this one is lost
    key = (spec.name, device, dtype, selection)
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = Plan(spec, device.type, dtype_name(dtype), selection)
    return plan.direct or _choose(plan, spec, device.type, dtype, selection, args)


def _choose(
    plan: Plan, spec: OpSpec, device_type: str, dtype: "torch.dtype", selection: Selection, args: Tuple[Any, ...]
) -> Kernel:
    call = Call(spec, args)
    refused: List[Tuple[str, str]] = []
    for backend, kernel, refusal in plan.steps:
        reason = refusal if kernel is None else refusal or kernel.refusal_of(call)
        if kernel is not None and not reason:
            if refused and backend not in selection.names:
                preferred, why = refused[0]
                _record(Fallback(spec.name, device_type, dtype_name(dtype), preferred, backend, why))
            return kernel
        refused.append((backend, reason))
    tried = "".join(f"\n  {backend}: {reason}" for backend, reason in refused) or "\n  none has kernels for this device"
    raise OpNotSupportedError(f"no backend can run {spec.name} on {device_type} {dtype} (selected by {selection.source}):{tried}")


def _record(event: Fallback) -> None:
    with _lock:
        count = _counts[event] = _counts.get(event, 0) + 1
    if count == 1:
        registry.call_hook("bnb_fallback", event=event)
        if _selection.fallback_policy() == "warn":
            warnings.warn(f"{event}; set BNB_FALLBACK=allow to silence this", BackendFallbackWarning, stacklevel=2)


def fallbacks() -> Dict[Fallback, int]:
    """Return how often each op ran on another backend than the preferred one, and why, since the process started."""
    with _lock:
        return dict(_counts)


def reset_fallbacks() -> None:
    """Set the counts to zero, and warn again about each kind of fallback."""
    with _lock:
        _counts.clear()


def note_failure(error: BaseException, kernel: Kernel, device: "torch.device") -> None:
    """Say on an exception whose kernel raised it, where Python can show that (from 3.11 on).

    The call is never tried again elsewhere: its outputs, or an optimizer's state, may be half written.
    """
    if hasattr(error, "add_note"):
        origin = registry.origin(kernel.backend)
        error.add_note(f"{kernel.op.name} failed in backend {kernel.backend.name!r} ({origin}) on {device}")


def _forget_plans() -> None:
    global _plans
    _plans = {}


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the thread that held it does not exist in the child


registry.on_change.append(_forget_plans)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
