"""The backend under test: its kernels are called through the ops of the core, alone, and between guards."""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterator, Optional, Sequence, Tuple

import pytest
import torch

from bnb_core.backends import Backend, Call, get_backend
from bnb_core.backends.discovery import registry
from bnb_core.backends.selection import Selection, pinned
from bnb_core.errors import OpNotSupportedError
from bnb_core.ops.spec import OPS, Nested, OpSpec, Parameter
from bnb_core.ops.structured import structured_op
from bnb_core.testing.expectations import expectation
from bnb_core.testing.guards import PLACEMENTS, Arena, Placement

Results = Tuple[Any, ...]


def for_ops(*ops: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the decorated test, which takes the fixture `bnb_kernel`, for each of these ops and each of its dtypes."""
    pairs = [(op, dtype) for op in ops for dtype in OPS[op].dtypes]
    return pytest.mark.parametrize(("bnb_op", "bnb_dtype"), pairs, ids=[f"{op}-{dtype}" for op, dtype in pairs])


class Subject:
    """A backend on one type of device.

    Args:
        name: the backend's.
        device: torch device type; by default "cpu" if the backend has kernels for it, else the first that it has kernels for.
        strict: fail, instead of skip, what the backend does not declare or refuses.
    """

    def __init__(self, name: str, device: Optional[str] = None, strict: bool = False) -> None:
        self.backend = get_backend(name)
        self.device = torch.device(device or _default_device(name))
        self.strict = strict
        self.selection = _alone(name)

    def refusal(self, op: str, dtype: str) -> str:
        """Say why the backend declares no kernel for this op and dtype; empty if it does."""
        kernel = self.backend.kernels.get(op)
        if kernel is None:
            return f"{self.backend.name} does not implement {op}"
        reason = kernel.refusal(self.device.type, dtype)
        return f"{self.backend.name} does not implement {op} for this: {reason}" if reason else ""

    def kernel(self, op: str, dtype: str) -> "KernelUnderTest":
        """Return the backend's kernel for an op and dtype, or skip the test if it does not declare one."""
        refusal = self.refusal(op, dtype)
        if refusal:
            self.refuse(refusal)
        return KernelUnderTest(self, OPS[op], getattr(torch, dtype))

    def call(self, op: str, *args: Any, out: Any = None) -> Any:
        """Call an op as it is, on arguments that are on the device. No other backend runs it."""
        with pinned(self.selection):
            return structured_op(op)(*args, out=out)

    def refuse(self, reason: str) -> None:
        """Skip the test, or fail it if the backend must be complete."""
        if self.strict:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


class KernelUnderTest:
    """One op on one dtype, run by the backend under test and by no other."""

    def __init__(self, subject: Subject, spec: OpSpec, dtype: torch.dtype) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = subject.device
        self.backend = subject.backend
        self._subject = subject

    def verify(self, *args: Any) -> None:
        """Run the op, and fail unless each run gives what the oracle says.

        Args:
            args: as for `runs`.
        """
        check = expectation(self.spec, args)
        for results in self.runs(*args):
            check(results)

    def runs(self, *args: Any) -> Iterator[Results]:
        """Run the op once for each placement in memory, and yield its results on the CPU.

        The arguments are copied to the device. Results are the outputs, then the lists that the op updates in place; each lies
        between guards. After the op it is checked that nothing else was written.

        Args:
            args: all arguments of the op, in order, with tensors on the CPU.
        """
        for placement in PLACEMENTS:
            yield self._run(args, placement)

    def run(self, *args: Any) -> Results:
        """Run the op once, as `runs` does first."""
        return self._run(args, PLACEMENTS[0])

    def call(self, *args: Any) -> Any:
        """Call the op as a user does, without guards, on its tensors moved to the device."""
        return self._call([value.to(self.device) if isinstance(value, torch.Tensor) else value for value in args], None)

    def _run(self, args: Tuple[Any, ...], placement: Placement) -> Results:
        arena = Arena(placement, self.device)
        placed = [_place(arena, parameter, value) for parameter, value in zip(self.spec.parameters, args)]
        shapes = structured_op(self.spec.name).meta(*placed)
        outputs = tuple(arena.empty(name, tuple(shape), dtype) for (name, _), (shape, dtype) in zip(self.spec.outputs, shapes))
        self._call(placed, outputs[0] if len(outputs) == 1 else outputs or None)
        arena.check()
        updated = [value for parameter, value in zip(self.spec.parameters, placed) if parameter.mutated]
        return tuple(output.cpu() for output in outputs) + tuple([tensor.cpu() for tensor in tensors] for tensors in updated)

    def _call(self, args: Sequence[Any], out: Any) -> Any:
        """Call the op; skip the test if the kernel's `when` refuses."""
        try:
            return self._subject.call(self.spec.name, *args, out=out)
        except OpNotSupportedError:
            reason = self.backend.kernels[self.spec.name].refusal_of(Call(self.spec, tuple(args)))
            if reason:
                self._subject.refuse(f"{self.backend.name} refuses {self.spec.name}: {reason}")
            raise


class _Alone(Selection):
    """One backend, and nothing to fall back to, whatever the environment says."""

    def chain(self, device_type: str) -> Tuple[Backend, ...]:
        return (registry.backend(self.names[0]),)


@functools.lru_cache(maxsize=None)
def _alone(name: str) -> Selection:
    return _Alone((name,), "the conformance suite")


def _default_device(name: str) -> str:
    declared = sorted({device for kernel in get_backend(name).kernels.values() for device in kernel.devices})
    return "cpu" if not declared or get_backend(name).covers("cpu") else declared[0]


def _place(arena: Arena, parameter: Parameter, value: Any) -> Any:
    """Copy the tensors of an argument into the arena."""
    if isinstance(value, torch.Tensor):
        return arena.copy(parameter.name, value, parameter.mutated)
    if isinstance(value, Nested):
        absmax, codebook, offset = (arena.copy(f"nested.{name}", tensor) for name, tensor in zip(Nested._fields, value[:3]))
        return Nested(absmax, codebook, offset, value.blocksize)
    if parameter.kind == "tensors":
        return [arena.copy(f"{parameter.name}[{i}]", tensor, parameter.mutated) for i, tensor in enumerate(value)]
    return value
