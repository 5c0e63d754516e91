"""Make the ops of the spec known to torch as `torch.ops.bnb.*`, with shapes, derivatives and batching. Needs torch 2.4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence, Tuple

import torch

from bnb_core.ops import derivatives
from bnb_core.ops.schema import torch_schema, unflatten

if TYPE_CHECKING:
    from bnb_core.ops.structured import StructuredOp

_library = torch.library.Library("bnb", "DEF")


def define(op: "StructuredOp") -> Any:
    """Register the op, and return its entry of `torch.ops.bnb`."""
    name = op.spec.name
    _library.define(torch_schema(op.spec), tags=(torch.Tag.pt2_compliant_tag,))
    torch_op = getattr(torch.ops.bnb, name).default
    _library.impl(name, lambda *flat: op.run(*unflatten(op.spec, flat)), "CompositeExplicitAutograd")
    _library.impl(name, lambda *flat: _empty_outputs(op, flat), "Meta")
    if op.adjoint is None:
        # Results of what has no derivative are constants; without this, torch would take them for something to warn about.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        torch.library.register_autograd(f"bnb::{name}", _backward, setup_context=_setup_context(op), lib=_library)
    if op.spec.outputs and hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap(f"bnb::{name}", _vmap(op, torch_op), lib=_library)
    return torch_op


def _empty_outputs(op: "StructuredOp", flat: Sequence[Any]) -> Any:
    args = unflatten(op.spec, flat)
    outputs = op.check(args)
    if not outputs:
        return None
    device = op.first_of(args).device
    results = tuple(torch.empty(tuple(shape), dtype=dtype, device=device) for shape, dtype in outputs)
    return results[0] if len(results) == 1 else results


def _setup_context(op: "StructuredOp") -> Any:
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        derivatives.save(ctx, op, unflatten(op.spec, inputs))

    return setup_context


def _backward(ctx: Any, grad: torch.Tensor) -> Tuple[Any, ...]:
    return tuple(derivatives.gradients_by_schema(ctx, grad, ctx.needs_input_grad))


def _vmap(op: "StructuredOp", torch_op: Any) -> Any:
    def vmap(info: Any, in_dims: Tuple[Any, ...], *flat: Any) -> Any:
        if op.rowwise and all(dim is None for dim in in_dims[1:]):
            return torch_op(flat[0].movedim(in_dims[0], 0), *flat[1:]), 0
        batched = [value if dim is None else value.movedim(dim, 0) for value, dim in zip(flat, in_dims)]
        if info.batch_size == 0:
            return _none_of(op, batched, in_dims)
        calls = [
            torch_op(*(value if dim is None else value[i] for value, dim in zip(batched, in_dims))) for i in range(info.batch_size)
        ]
        if len(op.spec.outputs) == 1:
            return torch.stack(calls), 0
        return tuple(torch.stack(column) for column in zip(*calls)), (0,) * len(op.spec.outputs)

    return vmap


def _none_of(op: "StructuredOp", batched: Sequence[Any], in_dims: Tuple[Any, ...]) -> Any:
    """Return the outputs of no call at all, and their batch dimensions."""
    call = [value if dim is None else value.new_empty(value.shape[1:]) for value, dim in zip(batched, in_dims)]
    args = unflatten(op.spec, call)
    device = op.first_of(args).device
    results = tuple(torch.empty((0, *shape), dtype=dtype, device=device) for shape, dtype in op.check(args))
    return (results[0], 0) if len(results) == 1 else (results, (0,) * len(results))
