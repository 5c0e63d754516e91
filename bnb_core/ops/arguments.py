"""Bring the arguments of a call to the Python types that the spec gives them, or say which one does not fit."""

from __future__ import annotations

import numbers
from typing import Any, Callable, Dict, Sequence, Tuple

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import is_compiling
from bnb_core.ops.spec import Hyperparameters, Nested, OpSpec, Parameter

#: Python's numbers, and those that stand for them while torch traces. A bool is no number here.
_INTEGERS: Tuple[type, ...] = (int, *((torch.SymInt,) if hasattr(torch, "SymInt") else ()))
_FLOATS: Tuple[type, ...] = (float, *((torch.SymFloat,) if hasattr(torch, "SymFloat") else ()))


def conform(spec: OpSpec, args: Sequence[Any]) -> Tuple[Any, ...]:
    """Return the arguments of an op with their types as the spec has them.

    Numbers of NumPy become Python's, an int becomes a float where one is meant, and a sequence of ints becomes a `torch.Size`.

    Args:
        spec: the op.
        args: all its arguments, in order.

    Raises:
        InvalidArgumentError: an argument is of a type that cannot stand for the spec's.
    """
    return tuple(_BY_KIND[parameter.kind](spec.name, parameter, value) for parameter, value in zip(spec.parameters, args))


def _refuse(op: str, parameter: Parameter, value: Any, accepted: str) -> InvalidArgumentError:
    given = f"of type {type(value).__name__}"
    if value is None or isinstance(value, (numbers.Number, str)):
        given = f"{value!r}, {given}" if value is not None else "None"
    return InvalidArgumentError(f"{op}: {parameter.name} is {given}; pass {accepted}{' or None' if parameter.optional else ''}")


def _tensor(op: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, torch.Tensor) or (value is None and parameter.optional) or hasattr(type(value), "__torch_function__"):
        return value
    raise _refuse(op, parameter, value, "a torch.Tensor")


def _tensors(op: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, (list, tuple)) and all(isinstance(tensor, torch.Tensor) for tensor in value):
        return value
    raise _refuse(op, parameter, value, "a list of torch.Tensor")


def _int(op: str, parameter: Parameter, value: Any) -> Any:
    if not isinstance(value, bool):
        if isinstance(value, _INTEGERS):
            return value
        if isinstance(value, numbers.Integral):
            return int(value)
    raise _refuse(op, parameter, value, "an int")


def _ints(op: str, parameter: Parameter, value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _refuse(op, parameter, value, "a sequence of ints")
    sizes = [_int(op, parameter, size) for size in value]
    return tuple(sizes) if is_compiling() else torch.Size(sizes)


def _float(op: str, parameter: Parameter, value: Any) -> Any:
    if not isinstance(value, bool):
        if isinstance(value, _FLOATS):
            return value
        if isinstance(value, numbers.Real):
            return float(value)
    raise _refuse(op, parameter, value, "a float")


def _str(op: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, str):
        return value
    raise _refuse(op, parameter, value, "a str")


def _dtype(op: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return value
    raise _refuse(op, parameter, value, "a torch.dtype, such as torch.float32")


def _nested(op: str, parameter: Parameter, value: Any) -> Any:
    if value is None:
        return None
    if not (isinstance(value, tuple) and len(value) == len(Nested._fields)):
        raise _refuse(op, parameter, value, "bnb_core.ops.Nested(absmax, codebook, offset, blocksize)")
    fields = [Parameter(f"nested.{field}", "tensor") for field in Nested._fields]
    absmax, codebook, offset = (_tensor(op, field, tensor) for field, tensor in zip(fields, value[:3]))
    return Nested(absmax, codebook, offset, _int(op, fields[3], value[3]))


def _hyperparameters(op: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, Hyperparameters):
        return value
    raise _refuse(op, parameter, value, "bnb_core.ops.Hyperparameters")


def _number(op: str, parameter: Parameter, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value
    return (_int if parameter.name == "step" else _float)(op, parameter, value)


_BY_KIND: Dict[str, Callable[[str, Parameter, Any], Any]] = {
    "tensor": _tensor,
    "tensors": _tensors,
    "int": _int,
    "ints": _ints,
    "float": _float,
    "str": _str,
    "dtype": _dtype,
    "nested": _nested,
    "hyperparameters": _hyperparameters,
    "number": _number,
}
