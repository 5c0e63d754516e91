"""Find the kernel for one call, and keep count of where another than the preferred backend had to run it.

What can be known without the call (which backends, devices, dtypes) is worked out once for each (op, device, dtype, selection) and
cached as a `Plan`. A call on a plan without fallbacks and without `when` costs one dictionary look-up.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Set, Tuple

from bnb_core.backends import selection as _selection
from bnb_core.backends.api import Call, Kernel
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
    """That an op ran on `chosen` because `preferred` refused it."""

    op: str
    device: str
    dtype: str
    preferred: str
    chosen: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} on {self.device} {self.dtype}: {self.preferred} -> {self.chosen} ({self.reason})"


@dataclass(frozen=True)
class _Refusal:
    backend: str
    reason: str
    counts: bool
    """Whether another backend's running the op is a fallback, rather than what was asked for."""


class Plan:
    """What is known about an (op, device, dtype, selection) before any call."""

    __slots__ = ("candidates", "direct")

    def __init__(self, candidates: Tuple[Tuple[Kernel, Tuple[_Refusal, ...]], ...], refusals: Tuple[_Refusal, ...]) -> None:
        #: Kernels in order, each with what was refused before it; at the end, None with all refusals.
        self.candidates: Tuple[Tuple[Optional[Kernel], Tuple[_Refusal, ...]], ...] = (*candidates, (None, refusals))
        self.direct: Optional[Kernel] = None
        if candidates:
            kernel, refused = candidates[0]
            if kernel.when is None and not any(r.counts for r in refused) and _knows_all_parameters(kernel):
                self.direct = kernel


_plans: Dict[Tuple[str, Any, Any, Selection], Plan] = {}
_counts: Dict[Fallback, int] = {}
_warned: Set[Fallback] = set()
_lock = threading.Lock()


def resolve(spec: OpSpec, device: "torch.device", dtype: "torch.dtype", args: Tuple[Any, ...]) -> Kernel:
    """Return the kernel that runs this call.

    Args:
        spec: the op. `args` are its arguments, complete and in the spec's order.
        device, dtype: those that the spec dispatches by.

    Raises:
        OpNotSupportedError: every selected backend refuses; the message lists each with its reason.
        BackendError: a backend that was asked for by name cannot be had.
    """
    selection = _selection.current()
    key = (spec.name, device, dtype, selection)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _make_plan(spec, device.type, dtype, selection)
    if plan.direct is not None:
        return plan.direct
    return _choose(plan, spec, device.type, dtype, selection, args)


def _make_plan(spec: OpSpec, device_type: str, dtype: "torch.dtype", selection: Selection) -> Plan:
    candidates: List[Tuple[Kernel, Tuple[_Refusal, ...]]] = []
    refusals: List[_Refusal] = []
    for backend in selection.chain(device_type):
        kernel = backend.kernels.get(spec.name)
        reason = "does not implement it" if kernel is None else kernel.refusal(device_type, dtype)
        if kernel is None or reason is not None:
            refusals.append(_Refusal(backend.name, reason or "", True))
        else:
            candidates.append((kernel, tuple(refusals)))
    # Someone who lists several backends asked for each of them: moving along that list is not a fallback.
    listed = [(k, tuple(_Refusal(r.backend, r.reason, k.backend.name not in selection.names) for r in rs)) for k, rs in candidates]
    return Plan(tuple(listed), tuple(refusals))


def _knows_all_parameters(kernel: Kernel) -> bool:
    return all(parameter.since <= kernel.backend.api_version for parameter in kernel.op.parameters)


def _choose(
    plan: Plan, spec: OpSpec, device_type: str, dtype: "torch.dtype", selection: Selection, args: Tuple[Any, ...]
) -> Kernel:
    call = Call(spec, args)
    refused_now: List[_Refusal] = []
    for kernel, refused in plan.candidates:
        if kernel is None:
            raise OpNotSupportedError(_nobody(spec, device_type, dtype, selection, [*refused, *refused_now]))
        reason = _refusal_of_call(kernel, call)
        if reason is None:
            counted = [r for r in (*refused, *refused_now) if r.counts and kernel.backend.name not in selection.names]
            if counted:
                first = counted[0]
                _record(Fallback(spec.name, device_type, str(dtype), first.backend, kernel.backend.name, first.reason), selection)
            return kernel
        refused_now.append(_Refusal(kernel.backend.name, reason, True))
    raise AssertionError("unreachable: a plan ends with its refusals")


def _refusal_of_call(kernel: Kernel, call: Call) -> Optional[str]:
    for parameter in kernel.op.parameters:
        if parameter.since > kernel.backend.api_version and getattr(call, parameter.name) != parameter.default:
            return f"written for an API without {parameter.name!r}"
    if kernel.when is not None:
        support = kernel.when(call)
        if not support:
            return support.reason or "no reason given"
    return None


def _nobody(spec: OpSpec, device_type: str, dtype: "torch.dtype", selection: Selection, refusals: List[_Refusal]) -> str:
    tried = (
        "".join(f"\n  {refusal.backend}: {refusal.reason}" for refusal in refusals) or "\n  no backend has kernels for this device"
    )
    return f"no backend can run {spec.name} on {device_type} {dtype} (selected by {selection.source}):{tried}"


def _record(event: Fallback, selection: Selection) -> None:
    with _lock:
        _counts[event] = _counts.get(event, 0) + 1
        new = event not in _warned
        _warned.add(event)
    if new:
        for _ in registry.call_hook("bnb_fallback", event=event):
            pass
        if selection.fallback == "warn":
            warnings.warn(f"{event}; set BNB_FALLBACK=allow to silence this", BackendFallbackWarning, stacklevel=2)


def fallbacks() -> Dict[Fallback, int]:
    """Return how often each op ran on another backend than the preferred one, and why, since the process started."""
    with _lock:
        return dict(_counts)


def reset_fallbacks() -> None:
    """Set the counts to zero, and warn again about each kind of fallback."""
    with _lock:
        _counts.clear()
        _warned.clear()


registry.on_change.append(_plans.clear)
