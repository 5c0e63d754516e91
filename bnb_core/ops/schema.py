"""Translate between an op's arguments as Python sees them and as its torch schema has them.

Three kinds of argument have no torch type and are spelled out in the schema: `nested` (three tensors and an int),
`hyperparameters` (one entry a field), and a `number` (a value, and a tensor that replaces it if given).
"""

from __future__ import annotations

from typing import Any, Iterator, List, Sequence, Tuple

import torch

from bnb_core.ops.spec import Hyperparameters, Nested, OpSpec, Parameter

_SCALARS = {"int": "SymInt", "ints": "SymInt[]", "float": "float", "str": "str", "dtype": "ScalarType"}
_FIELD_TYPES = {float: "float", int: "int", bool: "bool"}
#: The torch type of each number: steps are counted, learning rates are not.
_NUMBERS = {"step": "SymInt", "lr": "float"}
_NOT_NESTED = (None, None, None, 0)


def torch_schema(spec: OpSpec) -> str:
    """Return the op's torch schema, such as `quantize_4bit(Tensor x, Tensor codebook, SymInt blocksize) -> (Tensor, Tensor)`."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    arguments = ", ".join(entry for parameter in spec.parameters for entry in _entries(parameter, letters))
    returns = ", ".join("Tensor" for _ in spec.outputs)
    return f"{spec.name}({arguments}) -> {returns if len(spec.outputs) == 1 else f'({returns})'}"


def _entries(parameter: Parameter, letters: Iterator[str]) -> List[str]:
    name = parameter.name
    if parameter.kind == "tensor":
        return [f"Tensor{'?' if parameter.optional else ''} {name}"]
    if parameter.kind == "tensors":
        return [f"Tensor({next(letters)}!)[] {name}" if parameter.mutated else f"Tensor[] {name}"]
    if parameter.kind == "nested":
        return ["Tensor? nested_absmax", "Tensor? nested_codebook", "Tensor? nested_offset", "SymInt nested_blocksize"]
    if parameter.kind == "hyperparameters":
        defaults = Hyperparameters()
        return [f"{_FIELD_TYPES[type(default)]} {field}" for field, default in zip(Hyperparameters._fields, defaults)]
    if parameter.kind == "number":
        return [f"{_NUMBERS[name]} {name}", f"Tensor? {name}_tensor"]
    return [f"{_SCALARS[parameter.kind]} {name}"]


def flatten(spec: OpSpec, args: Sequence[Any]) -> List[Any]:
    """Spell an op's arguments out as its torch schema has them."""
    flat: List[Any] = []
    for parameter, value in zip(spec.parameters, args):
        if parameter.kind == "nested":
            flat.extend(_NOT_NESTED if value is None else value)
        elif parameter.kind == "hyperparameters":
            flat.extend(value)
        elif parameter.kind == "number":
            flat.extend((0, value) if isinstance(value, torch.Tensor) else (value, None))
        else:
            flat.append(value)
    return flat


def unflatten(spec: OpSpec, flat: Sequence[Any]) -> Tuple[Any, ...]:
    """Undo `flatten`."""
    values = iter(flat)
    args: List[Any] = []
    for parameter in spec.parameters:
        if parameter.kind == "nested":
            nested = Nested(next(values), next(values), next(values), next(values))
            args.append(None if nested.absmax is None else nested)
        elif parameter.kind == "hyperparameters":
            args.append(Hyperparameters(*(next(values) for _ in Hyperparameters._fields)))
        elif parameter.kind == "number":
            number, tensor = next(values), next(values)
            args.append(number if tensor is None else tensor)
        else:
            args.append(next(values))
    return tuple(args)


def tensors_of(spec: OpSpec, args: Sequence[Any]) -> List[Any]:
    """List every tensor among an op's arguments."""
    tensors: List[Any] = []
    for parameter, value in zip(spec.parameters, args):
        if parameter.kind == "tensors":
            tensors.extend(value)
        elif isinstance(value, Nested):
            tensors.extend(value[:3])
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
    return tensors


def names_of(spec: OpSpec, args: Sequence[Any]) -> List[str]:
    """Name the tensors of `tensors_of`, for messages."""
    names: List[str] = []
    for parameter, value in zip(spec.parameters, args):
        if parameter.kind == "tensors":
            names.extend(f"{parameter.name}[{i}]" for i in range(len(value)))
        elif isinstance(value, Nested):
            names.extend(f"nested.{field}" for field in Nested._fields[:3])
        elif isinstance(value, torch.Tensor):
            names.append(parameter.name)
    return names
