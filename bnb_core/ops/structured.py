"""Tie an op's spec, argument checks, output shapes and derivative together, once, for eager, compiled and traced calls.

op(x, ...)
  plain tensors:    StructuredOp.run: checks -> resolve the kernel -> allocate -> kernel(..., out=)
  everything else:  torch.ops.bnb.<op>, whose implementation is the same `run`, and whose Meta kernel the same shapes
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch

from bnb_core.backends import dispatch, selection
from bnb_core.backends.api import Call
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED, is_plain, ordinary_execution, under_functorch
from bnb_core.ops.schema import flatten, tensors_of, torch_schema, unflatten
from bnb_core.ops.spec import OPS, Nested

#: Shape and dtype of one output.
Output = Tuple[Sequence[Any], torch.dtype]

_library: Any = torch.library.Library("bnb", "DEF") if REGISTERED else None
_ops: Dict[str, "StructuredOp"] = {}


class StructuredOp:
    """An op of the spec, callable with its parameters by position.

    Args:
        name: the op's name in `OPS`.
        meta: checks the arguments by shape, dtype and value of scalars, and returns the (shape, dtype) of each output.
        adjoint: for an op that is linear in its first argument: name of the op that computes the gradient of that argument from
            the output's, or a function of the output's gradient and of the other arguments by name. The other tensors are
            constants, except a bias that is added at the end.
        check_values: checks of values on CPU tensors, where reading them costs no synchronization.
    """

    def __init__(
        self,
        name: str,
        meta: Callable[..., Sequence[Output]],
        *,
        adjoint: Union[str, Callable[..., torch.Tensor], None] = None,
        check_values: Optional[Callable[..., None]] = None,
    ) -> None:
        self.spec = OPS[name]
        self.meta = meta
        self.adjoint = adjoint
        #: A linear op on rows takes one more leading dimension as it is.
        self._folds_batch = adjoint is not None and "..." in OPS[name].parameters[0].layout
        self.check_values = check_values
        names = [parameter.name for parameter in self.spec.parameters]
        self._device_at = names.index(self.spec.dispatch)
        self._dtype_at = names.index(self.spec.dispatch_dtype) if self.spec.dispatch_dtype else None
        self._bias_at = names.index("bias") if "bias" in names else None
        self._dropped = [i for i, parameter in enumerate(self.spec.parameters) if not parameter.to_kernel]
        self._is_list = self.spec.parameters[self._device_at].kind == "tensors"
        self._tensor_at = [i for i, parameter in enumerate(self.spec.parameters) if parameter.kind == "tensor"]
        self._nested_at = names.index("nested") if "nested" in names else None
        self._torch_op: Any = None
        self.flat_bias_at: Optional[int] = None
        _ops[name] = self
        if REGISTERED:
            self._register()

    # ---------------------------------------------------------------------------------------------------------------- calling

    def __call__(self, *args: Any, out: Any = None) -> Any:
        """Run the op, directly where that is right and through the torch dispatcher otherwise."""
        if REGISTERED and not (ordinary_execution() and is_plain(self._tensors(args))):
            flat = flatten(self.spec, args)
            if self.adjoint is not None and under_functorch():
                result = _TransformedLinearFunction.apply(self, *flat)
            else:
                result = self._torch_op(*flat)
            return result if out is None else self._copy_out(result, out)
        if self.adjoint is not None and out is None and torch.is_grad_enabled() and self._needs_grad(args):
            bias = args[self._bias_at] if self._bias_at is not None else None
            return _LinearFunction.apply(self, args, args[0], bias)
        return self.run(*args, out=out)

    def run(self, *args: Any, out: Any = None) -> Any:
        """Check, resolve, allocate and run. `out` takes the place of the allocated outputs: a tensor, or a tuple of tensors."""
        outputs = self.meta(*args)
        first = args[self._device_at][0] if self._is_list else args[self._device_at]
        self._check_devices(args, first.device)
        if self.check_values is not None and first.device.type == "cpu":
            self.check_values(*args)
        results, targets = self._allocate(outputs, first.device, out)
        if first.device.type == "meta":
            return self._finish(results, results)
        if all(tensor.numel() for tensor in targets) and first.numel():
            self._run_kernel(args, first, targets)
        else:
            self._run_empty(args, targets)
        return self._finish(results, targets)

    def _run_kernel(self, args: Tuple[Any, ...], first: torch.Tensor, targets: Tuple[torch.Tensor, ...]) -> None:
        args = self._contiguous(args)
        dtype = first.dtype if self._dtype_at is None else args[self._dtype_at]
        kernel = dispatch.resolve(self.spec, first.device, dtype, args)
        keywords: Dict[str, Any] = {}
        if targets:
            keywords["out"] = targets[0] if len(targets) == 1 else targets
        if kernel.scratch is not None:
            size = kernel.scratch(Call(self.spec, args))
            keywords["scratch"] = torch.empty(size, dtype=torch.uint8, device=first.device)
        kernel_args = args if not self._dropped else [value for i, value in enumerate(args) if i not in self._dropped]
        try:
            kernel.function(*kernel_args[: kernel.arity], **keywords)
        except Exception as error:
            dispatch.note_failure(error, kernel, first.device)
            raise

    def _run_empty(self, args: Tuple[Any, ...], targets: Tuple[torch.Tensor, ...]) -> None:
        """Fill outputs that do not depend on any element: a sum over nothing is zero, and the bias is added to it."""
        for target in targets:
            target.zero_()
        bias = args[self._bias_at] if self._bias_at is not None else None
        if bias is not None:
            targets[0].add_(bias)

    # ------------------------------------------------------------------------------------------------------- arguments and outputs

    def _tensors(self, args: Tuple[Any, ...]) -> List[Any]:
        """List the tensors (and None for absent ones) among the arguments."""
        if self._is_list:
            return tensors_of(self.spec, args)
        tensors = [args[i] for i in self._tensor_at]
        if self._nested_at is not None and args[self._nested_at] is not None:
            tensors.extend(args[self._nested_at][:3])
        return tensors

    def _needs_grad(self, args: Tuple[Any, ...]) -> bool:
        if args[0].requires_grad:
            return True
        bias = args[self._bias_at] if self._bias_at is not None else None
        return bias is not None and bias.requires_grad

    def _check_devices(self, args: Tuple[Any, ...], device: torch.device) -> None:
        for tensor in self._tensors(args):
            if tensor is not None and tensor.device != device:
                places = ", ".join(
                    f"{p.name} on {a.device}" for p, a in zip(self.spec.parameters, args) if isinstance(a, torch.Tensor)
                )
                raise InvalidArgumentError(
                    f"{self.spec.name}: tensors are on different devices ({places or f'{tensor.device} and {device}'}); "
                    "move them to one"
                )

    def _contiguous(self, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
        changed: Optional[List[Any]] = None
        for i in self._tensor_at:
            tensor = args[i]
            if tensor is not None and not tensor.is_contiguous():
                changed = changed or list(args)
                changed[i] = tensor.contiguous()
        if self._nested_at is not None:
            nested = args[self._nested_at]
            if nested is not None and not (nested.absmax.is_contiguous() and nested.codebook.is_contiguous()):
                changed = changed or list(args)
                changed[self._nested_at] = Nested(nested[0].contiguous(), nested[1].contiguous(), nested[2], nested[3])
        return args if changed is None else tuple(changed)

    def _allocate(
        self, outputs: Sequence[Output], device: torch.device, out: Any
    ) -> Tuple[Tuple[torch.Tensor, ...], Tuple[torch.Tensor, ...]]:
        """Return the tensors that the caller gets, and those that the kernel fills: others where the former have gaps."""
        if out is None:
            results = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in outputs)
            return results, results
        results = out if isinstance(out, tuple) else (out,)
        for (name, _), (shape, dtype), tensor in zip(self.spec.outputs, outputs, results):
            if tensor.shape != torch.Size(shape) or tensor.dtype != dtype or tensor.device != device:
                raise InvalidArgumentError(
                    f"{self.spec.name}: out for {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                    f"it must be {dtype} {list(shape)} on {device}"
                )
        return results, tuple(
            t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format) for t in results
        )

    def _finish(self, results: Tuple[torch.Tensor, ...], targets: Tuple[torch.Tensor, ...]) -> Any:
        for result, target in zip(results, targets):
            if result is not target:
                result.copy_(target)
        if not results:
            return None
        return results[0] if len(results) == 1 else results

    def _copy_out(self, result: Any, out: Any) -> Any:
        for target, value in zip(out if isinstance(out, tuple) else (out,), result if isinstance(result, tuple) else (result,)):
            target.copy_(value)
        return out

    # ------------------------------------------------------------------------------------------------------------ torch.ops.bnb

    def _register(self) -> None:
        name = self.spec.name
        _library.define(torch_schema(self.spec))
        _library.impl(name, lambda *flat: self.run(*unflatten(self.spec, flat)), "CompositeExplicitAutograd")
        _library.impl(name, self._run_meta, "Meta")
        self._torch_op = getattr(torch.ops.bnb, name).default
        names = [argument.name for argument in self._torch_op._schema.arguments]
        self.flat_bias_at = names.index("bias") if "bias" in names else None
        if self.adjoint is not None:
            torch.library.register_autograd(
                f"bnb::{name}", self._registered_backward, setup_context=self._registered_setup, lib=_library
            )
        if self.spec.outputs and hasattr(torch.library, "register_vmap"):
            torch.library.register_vmap(f"bnb::{name}", self._vmap, lib=_library)

    def _run_meta(self, *flat: Any) -> Any:
        args = unflatten(self.spec, flat)
        outputs = self.meta(*args)
        first = args[self._device_at][0] if self._is_list else args[self._device_at]
        results = tuple(torch.empty(shape, dtype=dtype, device=first.device) for shape, dtype in outputs)
        return self._finish(results, results)

    def _registered_setup(self, ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        _save(ctx, self, unflatten(self.spec, inputs))

    def _registered_backward(self, ctx: Any, grad: torch.Tensor) -> Tuple[Any, ...]:
        return _flat_gradients(ctx, self, grad, ctx.needs_input_grad)

    def _vmap(self, info: Any, in_dims: Tuple[Any, ...], *flat: Any) -> Any:
        if self._folds_batch and in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            return self._torch_op(flat[0].movedim(in_dims[0], 0), *flat[1:]), 0
        rows = []
        for i in range(info.batch_size):
            row = [value if dim is None else value.select(dim, i) for value, dim in zip(flat, in_dims)]
            rows.append(self._torch_op(*row))
        if len(self.spec.outputs) == 1:
            return torch.stack(rows), 0
        return tuple(torch.stack(column) for column in zip(*rows)), (0,) * len(self.spec.outputs)


# -------------------------------------------------------------------------------------------------------------------- derivatives

#: Stands for a tensor that autograd keeps.
_SAVED = object()


def _save(ctx: Any, op: StructuredOp, args: Tuple[Any, ...]) -> None:
    """Keep what the adjoint needs: every argument but the first and the bias."""
    flat = flatten(op.spec, [None if i in (0, op._bias_at) else value for i, value in enumerate(args)])
    ctx.save_for_backward(*(value for value in flat if isinstance(value, torch.Tensor)))
    ctx.bnb_flat = [_SAVED if isinstance(value, torch.Tensor) else value for value in flat]


def _gradients(
    ctx: Any, op: StructuredOp, grad: torch.Tensor, needs_x: bool, needs_bias: bool
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    grad_bias = grad.sum_to_size(grad.shape[-1]) if needs_bias else None
    if not needs_x:
        return None, grad_bias
    saved = iter(ctx.saved_tensors)
    args = unflatten(op.spec, [next(saved) if value is _SAVED else value for value in ctx.bnb_flat])
    values = {parameter.name: value for parameter, value in zip(op.spec.parameters, args)}
    if callable(op.adjoint):
        return op.adjoint(grad, **values), grad_bias
    adjoint = _ops[op.adjoint or ""]
    # The adjoint takes the same weight; a bias is the only parameter that it may have and the op not.
    return adjoint(grad, *(values.get(parameter.name) for parameter in adjoint.spec.parameters[1:])), grad_bias


class _LinearFunction(torch.autograd.Function):
    """The derivative of an op that is linear in its first argument, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, op: StructuredOp, args: Tuple[Any, ...], x: torch.Tensor, bias: Optional[torch.Tensor]) -> Any:
        _save(ctx, op, args)
        ctx.bnb_op = op
        ctx.bnb_selection = selection.current()
        return op.run(*args)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        _, _, needs_x, needs_bias = ctx.needs_input_grad
        with selection.pinned(ctx.bnb_selection):  # also on autograd's own threads, which do not see `use_backend`
            grad_x, grad_bias = _gradients(ctx, ctx.bnb_op, grads[0], needs_x, needs_bias)
        return None, None, grad_x, grad_bias


def _flat_gradients(ctx: Any, op: StructuredOp, grad: torch.Tensor, needs: Sequence[bool]) -> Tuple[Any, ...]:
    """Return the gradients of all arguments of the torch schema, of which only two can have one."""
    flat: List[Any] = [None] * len(needs)
    needs_bias = op.flat_bias_at is not None and needs[op.flat_bias_at]
    flat[0], grad_bias = _gradients(ctx, op, grad, needs[0], needs_bias)
    if op.flat_bias_at is not None:
        flat[op.flat_bias_at] = grad_bias
    return tuple(flat)


class _TransformedLinearFunction(torch.autograd.Function):
    """The same under function transforms (torch.func), which registered derivatives do not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: StructuredOp, *flat: Any) -> Any:
        return op._torch_op(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        op, *flat = inputs
        _save(ctx, op, unflatten(op.spec, flat))
        ctx.bnb_op = op

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return (None, *_flat_gradients(ctx, ctx.bnb_op, grads[0], ctx.needs_input_grad[1:]))


def structured_op(name: str) -> StructuredOp:
    """Return the op of that name in `OPS`; it takes the op's arguments by position, complete."""
    from bnb_core import ops

    getattr(ops, name)  # loads the family that defines it
    return _ops[name]
