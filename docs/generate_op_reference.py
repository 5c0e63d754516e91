"""Write op-reference.md from `bnb_core.ops.spec`: `python docs/generate_op_reference.py`."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Sequence

from bnb_core.ops import spec
from bnb_core.ops.schema import torch_schema
from bnb_core.ops.spec import ALGORITHMS, API_VERSION, BLOCKSIZES_4BIT, OPS, Hyperparameters, Nested, OpSpec, Parameter

PATH = Path(__file__).with_name("op-reference.md")

INTRODUCTION = """\
# Op reference

<!-- Written by docs/generate_op_reference.py from bnb_core/ops/spec.py; change these, not this file. -->

The ops of backend API {}.{}. Each is a function of `bnb_core.ops`, an op of `torch.ops.bnb` (from torch 2.4 on, once its function
has been looked up), and a kernel that a backend may implement. Arguments are in this order. Kernels get them all by position but
those that only shape the output, and fill `out`: a tensor, or a tuple of tensors where there are several outputs.

- Tensors may have any strides. Packed codes and block scales may have any shape with that number of elements.
- Blocksizes of 4-bit tensors are {}.
- `out`, where a function takes it, may have any strides and overlap arguments; it is refused where a gradient would be lost.
- Products are differentiable in their first argument and in the bias, in reverse and forward mode, as often as is asked for. All
  other results are constants. `int8_linear` has the derivative of the product with its dequantized weight.
- Autocast changes nothing: an op computes in the dtype of its tensors.
- An eager backward runs on the backends of its forward. A compiled, exported or traced graph chooses whenever it runs.
- `torch.func.grad` and its like work on eager calls, and vmap on compiled ones too. Within a compiled function `torch.func.grad`
  raises before torch 2.15: `torch.library.register_autograd`, by which the ops of graphs have derivatives, made of them an
  `autograd.Function` without the `setup_context` that function transforms ask for. Ordinary `backward()` and
  `torch.autograd.grad` around a compiled function work."""

CONTRACTS = {
    "exact": "exact, to the bit",
    "product": "the per-element bound of products",
    "optimizer": "the steps of `Hyperparameters`, in float32 on the unrounded state",
}


def render() -> str:
    """Return the text of the page."""
    blocksizes = ", ".join(map(str, BLOCKSIZES_4BIT))
    sections = [INTRODUCTION.format(*API_VERSION, blocksizes), _definitions()]
    sections += [_op(op) for op in OPS.values()]
    sections += [_fields(Nested), _fields(Hyperparameters), _algorithms()]
    return "\n\n".join(sections) + "\n"


def _definitions() -> str:
    """Return the part of the spec's docstring that defines notation and values."""
    text = inspect.cleandoc(spec.__doc__ or "")
    definitions = text[text.index("Notation.") : text.index("Who may change")].strip()
    return definitions.replace("What an op computes\n-------------------", "## What an op computes\n")


def _op(op: OpSpec) -> str:
    kernel = ", ".join([*op.kernel_parameters(), *(["*", "out"] if op.outputs else [])])
    parts = [
        f"## `{op.name}`",
        op.summary,
        f"Kernel: `{op.name}({kernel})`",
        _table(("parameter", "kind", "dtype and shape", ""), (_parameter(parameter) for parameter in op.parameters)),
    ]
    if op.outputs:
        parts.append(_table(("output", "dtype and shape"), ((f"`{name}`", _code(layout)) for name, layout in op.outputs)))
    dtype = f"`{op.dispatch_dtype}`" if op.dispatch_dtype else "its dtype"
    parts.append(
        f"Selected by the device of `{op.dispatch}` and {dtype} ({', '.join(op.dtypes)}). Contract: {CONTRACTS[op.contract]}.\n"
        f"Since API {'{}.{}'.format(*op.since)}. `bnb::{torch_schema(op)}`"
    )
    return "\n\n".join(parts)


def _parameter(parameter: Parameter) -> Sequence[str]:
    notes = [
        *(["optional"] if parameter.optional else []),
        *(["updated in place"] if parameter.mutated else []),
        *([] if parameter.to_kernel else ["shapes the output"]),
        *([] if parameter.since == (1, 0) else ["since API {}.{}; before, {!r}".format(*parameter.since, parameter.default)]),
    ]
    return f"`{parameter.name}`", parameter.kind, _code(parameter.layout), ", ".join(notes)


def _code(layout: str) -> str:
    """Mark the dtype and shape at the beginning of a layout, before any words, as code."""
    notation, colon, words = layout.partition(":")
    return f"`{notation}`{colon}{words}" if "[" in notation else layout


def _fields(cls: Any) -> str:
    """Describe a named tuple of the spec."""
    documented = _field_docstrings(cls)
    defaults: Dict[str, Any] = cls._field_defaults
    rows = (
        (f"`{field}`", f"`{defaults[field]!r}`" if field in defaults else "", documented.get(field, "")) for field in cls._fields
    )
    return "\n\n".join((f"## `{cls.__name__}`", inspect.cleandoc(cls.__doc__), _table(("field", "default", ""), rows)))


def _field_docstrings(cls: Any) -> Dict[str, str]:
    """Return the strings that follow the fields of a class in its source."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    documented = {}
    for field, after in zip(definition.body, definition.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            documented[field.target.id] = ast.literal_eval(after.value)
    return documented


def _algorithms() -> str:
    heading = "## Algorithms\n\nStates are given as `state1`, `state2` and `state3`; in brackets, what each depends on."
    rows = ((f"`{name}`", *(state or "" for state in states), rule) for name, (*states, rule) in ALGORITHMS.items())
    return heading + "\n\n" + _table(("algorithm", "state1", "state2", "state3", "rule"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def lines() -> Iterator[Sequence[str]]:
        yield head
        yield ["---"] * len(head)
        yield from rows

    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines())


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
