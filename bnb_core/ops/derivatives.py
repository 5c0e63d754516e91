"""Tie the ops that are linear in their first argument to autograd: for plain tensors, for torch.ops.bnb, and under torch.func."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

import torch

from bnb_core.backends import selection
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.schema import flatten, unflatten

if TYPE_CHECKING:
    from bnb_core.ops.structured import StructuredOp

MaybeTensor = Optional[torch.Tensor]


def needs_gradient(op: "StructuredOp", args: Sequence[Any]) -> bool:
    """Say whether an argument in which the op is differentiable requires grad."""
    if op.adjoint is None:
        return False
    bias = None if op.bias_at is None else args[op.bias_at]
    return args[0].requires_grad or (bias is not None and bias.requires_grad)


def _apply_adjoint(op: "StructuredOp", grad: torch.Tensor, args: Sequence[Any]) -> torch.Tensor:
    """Compute the gradient of the first argument. The other arguments are those of the op."""
    if callable(op.adjoint):
        return op.adjoint(grad, *args[1:])
    return op.adjoint_op(grad, *_arguments_of_adjoint(op, args)[1:])


def _apply_derivative(op: "StructuredOp", tangent: torch.Tensor, args: Sequence[Any]) -> torch.Tensor:
    """Compute the tangent of the output, as the adjoint of the adjoint: like the op itself, it rounds nothing but its result."""
    if callable(op.adjoint):
        return op(tangent, *args[1:])
    return _apply_adjoint(op.adjoint_op, tangent, _arguments_of_adjoint(op, args))


def _arguments_of_adjoint(op: "StructuredOp", args: Sequence[Any]) -> List[Any]:
    """Arrange the op's arguments as its adjoint takes them: it has the same weight under the same names, and no bias."""
    values = {parameter.name: value for parameter, value in zip(op.spec.parameters, args)}
    return [values.get(parameter.name) for parameter in op.adjoint_op.spec.parameters]


#: Stands for a tensor that autograd keeps.
_SAVED = object()


def save(ctx: Any, op: "StructuredOp", args: Sequence[Any]) -> List[torch.Tensor]:
    """Keep what the gradient of `op` needs: its arguments but the first and the bias, and the backends that its forward uses.

    Returns:
        The tensors that were saved.
    """
    flat = flatten(op.spec, [None if at == 0 or at == op.bias_at else value for at, value in enumerate(args)])
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.bnb_op = op
    ctx.bnb_flat = [_SAVED if isinstance(value, torch.Tensor) else value for value in flat]
    ctx.bnb_selection = selection.current()
    return tensors


def _saved_arguments(ctx: Any) -> Tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    return unflatten(ctx.bnb_op.spec, [next(saved) if value is _SAVED else value for value in ctx.bnb_flat])


def gradients(ctx: Any, grad: torch.Tensor, needs_x: bool, needs_bias: bool) -> Tuple[MaybeTensor, MaybeTensor]:
    """Return the gradients of the first argument and of the bias, where they are needed.

    They are computed by the backends of the forward, also on autograd's own threads, which do not see `use_backend`.
    """
    grad_bias = grad.sum_to_size(grad.shape[-1]) if needs_bias else None
    if not needs_x:
        return None, grad_bias
    with selection.pinned(ctx.bnb_selection):
        return _apply_adjoint(ctx.bnb_op, grad, _saved_arguments(ctx)), grad_bias


def gradients_by_schema(ctx: Any, grad: torch.Tensor, needs: Sequence[bool]) -> List[MaybeTensor]:
    """Return a gradient for each argument of the torch schema, of which only two can have one."""
    bias_at = ctx.bnb_op.bias_at
    flat: List[MaybeTensor] = [None] * len(needs)
    flat[0], grad_bias = gradients(ctx, grad, needs[0], bias_at is not None and needs[bias_at])
    if bias_at is not None:
        flat[bias_at] = grad_bias
    return flat


class LinearFunction(torch.autograd.Function):
    """The derivative for plain tensors."""

    @staticmethod
    def forward(ctx: Any, op: "StructuredOp", call: Tuple[Any, ...], x: torch.Tensor, bias: MaybeTensor) -> Any:
        """Run the op on a call that has been looked up; `x` and `bias` are among its arguments."""
        save(ctx, op, call[0])
        return op.run_direct(*call)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Return a gradient for each parameter of `forward`."""
        return (None, None, *gradients(ctx, grads[0], *ctx.needs_input_grad[2:]))


class TransformedFunction(torch.autograd.Function):
    """The derivative of any op under function transforms and in forward mode, of which the ops of torch.library know nothing.

    Results of what has no derivative are constants, as they are outside transforms.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: "StructuredOp", *flat: Any) -> Any:
        """Run the op on the arguments of its torch schema."""
        return op.torch_op(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        """Keep what the derivatives need."""
        op, *flat = inputs
        ctx.bnb_op = op
        ctx.set_materialize_grads(False)
        if op.adjoint is None:
            ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
        else:
            ctx.bnb_shape = output.shape
            ctx.save_for_forward(*save(ctx, op, unflatten(op.spec, flat)))

    @staticmethod
    def backward(ctx: Any, *grads: MaybeTensor) -> Any:
        """Return a gradient for each parameter of `forward`."""
        needs = ctx.needs_input_grad[1:]
        grad = grads[0]
        return (None, *([None] * len(needs) if grad is None else gradients_by_schema(ctx, grad, needs)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the tangent of the output.

        Raises:
            InvalidArgumentError: a tangent of an argument in which the op has no derivative, and which would be lost.
        """
        op, flat = ctx.bnb_op, tangents[1:]
        linear_in = () if op.adjoint is None else (0, op.bias_at)
        if any(tangent is not None and at not in linear_in for at, tangent in enumerate(flat)):
            raise InvalidArgumentError(
                f"{op.spec.name}: a tangent of an argument in which the op has no derivative; detach that argument first"
            )
        bias = None if op.bias_at is None else flat[op.bias_at]
        if flat[0] is None and bias is not None:
            return bias.expand(ctx.bnb_shape)
        tangent = _apply_derivative(op, flat[0], _saved_arguments(ctx))
        return tangent if bias is None else tangent + bias
