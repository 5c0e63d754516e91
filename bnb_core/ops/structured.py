"""Run an op: check the arguments, find the kernel, allocate the outputs, and let the kernel fill them.

op(x, ...)
  plain tensors:    `StructuredOp` runs the kernel itself, under autograd where a gradient is asked for (`derivatives`)
  everything else:  torch.ops.bnb.<op> (`registration`), implemented by the same `run`, with the same `check` as its Meta kernel

What checks and outputs depend on, which is the arguments' types, shapes, dtypes and devices and the values of numbers, is a call's
signature. It is worked out once and kept, so that a call like an earlier one costs a look-up.
"""

from __future__ import annotations

from functools import lru_cache, partial
from operator import attrgetter, itemgetter
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch

from bnb_core.backends import dispatch
from bnb_core.backends.api import Call
from bnb_core.errors import InvalidArgumentError, OpNotSupportedError
from bnb_core.ops import checks
from bnb_core.ops.arguments import conform
from bnb_core.ops.derivatives import LinearFunction, TransformedFunction, needs_gradient
from bnb_core.ops.outputs import Output, allocator, check_out, store, targets_for
from bnb_core.ops.plain import REGISTERED, is_compiling, is_plain, ordinary_execution, transforms_differentiate
from bnb_core.ops.schema import flatten, names_of, tensors_of
from bnb_core.ops.sharded import refuse_sharded
from bnb_core.ops.spec import OPS, Nested

if REGISTERED:
    from bnb_core.ops import registration

Tensors = Tuple[torch.Tensor, ...]

#: Signatures kept for each combination of argument types; when there are more, all are forgotten.
_MOST_SIGNATURES = 1024

_describe = attrgetter("shape", "dtype", "layout", "device", "requires_grad")
_ops: Dict[str, "StructuredOp"] = {}


class _Form:
    """What the types of a call's arguments say: where its tensors and its numbers are, and whether it may run directly.

    Args:
        flat: the arguments, with those of `nested` in its place if it is given.
        tensors_at: where among them tensors may be.
    """

    __slots__ = ("numbers", "plain", "signatures", "tensors")

    def __init__(self, flat: Tuple[Any, ...], tensors_at: Sequence[int]) -> None:
        given = [at for at, value in enumerate(flat) if value is not None]
        self.tensors = _picker([at for at in given if at in tensors_at])
        self.numbers = _picker([at for at in given if at not in tensors_at])
        self.plain = not REGISTERED or is_plain(self.tensors(flat))
        self.signatures: Dict[Any, _Signature] = {}


class _Signature:
    """What the shapes, dtypes and devices of a call's tensors and the values of its numbers say, once they have been checked."""

    __slots__ = ("allocators", "device", "differentiable", "outputs", "requires_grad", "runs")

    def __init__(self, op: "StructuredOp", args: Tuple[Any, ...], tensors: Tensors) -> None:
        self.outputs = op.check(args)
        first = op.first_of(args)
        self.device = first.device
        self.allocators = [allocator(shape, dtype, self.device) for shape, dtype in self.outputs]
        #: Whether there is anything for a kernel to do.
        self.runs = self.device.type != "meta" and first.numel() > 0 and all(0 not in shape for shape, _ in self.outputs)
        self.requires_grad = any(tensor.requires_grad for tensor in tensors)
        self.differentiable = needs_gradient(op, args)


class StructuredOp:
    """An op of the spec, callable with all its parameters by position.

    Args:
        name: the op's name in `OPS`.
        meta: checks the arguments by shape, dtype and value of numbers, and returns the (shape, dtype) of each output.
        adjoint: for an op that is linear in its first argument: name of the op that computes the gradient of that argument from
            the output's, or a function of the output's gradient and the op's other arguments. The other tensors are constants,
            except a bias that is added at the end.
        rowwise: the op works on each row of its first argument alone, so that more leading dimensions change nothing.
        check_values: checks of values on CPU tensors, where reading them costs no synchronization.
    """

    def __init__(
        self,
        name: str,
        meta: Callable[..., Sequence[Output]],
        *,
        adjoint: Union[str, Callable[..., torch.Tensor], None] = None,
        rowwise: bool = False,
        check_values: Optional[Callable[..., None]] = None,
    ) -> None:
        self.spec = OPS[name]
        self.meta = meta
        self.adjoint = adjoint
        self.rowwise = rowwise
        self.check_values = check_values
        names = [parameter.name for parameter in self.spec.parameters]
        kinds = [parameter.kind for parameter in self.spec.parameters]
        self.bias_at = names.index("bias") if "bias" in names else None
        self._first_at = names.index(self.spec.dispatch)
        self._dtype_at = names.index(self.spec.dispatch_dtype) if self.spec.dispatch_dtype else None
        self._nested_at = kinds.index("nested") if "nested" in kinds else None
        #: Where tensors may be, when the fields of `nested`, always the last parameter, are in its place.
        self._tensors_at = [at for at, kind in enumerate(kinds) if kind == "tensor"]
        if self._nested_at is not None:
            self._tensors_at.extend(range(self._nested_at, self._nested_at + 3))
        to_kernel = [at for at, parameter in enumerate(self.spec.parameters) if parameter.to_kernel]
        self._kernel_arguments = _picker(to_kernel) if len(to_kernel) < len(names) else None
        self._forms: Dict[Tuple[type, ...], _Form] = {}
        _ops[name] = self
        self.torch_op: Any = registration.define(self) if REGISTERED else None

    # ---------------------------------------------------------------------------------------------------------------- calling

    def __call__(self, *args: Any, out: Any = None) -> Any:
        """Run the op; see `call`."""
        return self.call(args, out)

    def call(self, args: Tuple[Any, ...], out: Any = None) -> Any:
        """Run the op, directly where that is right and through the torch dispatcher otherwise.

        Args:
            args: all the op's arguments, in order.
            out: tensor, or tuple of tensors, to fill instead of new ones. They get what new ones would, also where they overlap
                arguments.

        Raises:
            InvalidArgumentError: the arguments or `out` do not fit the op.
        """
        if ordinary_execution():
            args, tensors, signature = self.look_up(args, plain_only=True)
            if signature is not None:
                if signature.requires_grad and torch.is_grad_enabled():
                    return self._run_with_grad(args, tensors, signature, out)
                return self.run_direct(args, tensors, signature, out)
        return self.dispatch(conform(self.spec, args), out)

    def run(self, *args: Any) -> Any:
        """Run the op on real tensors, below autograd: the implementation of torch.ops.bnb."""
        return self.run_direct(*self.look_up(args))

    def check(self, args: Tuple[Any, ...]) -> Sequence[Output]:
        """Check arguments that are of the right Python types, and return the shape and dtype of each output."""
        tensors, names = tensors_of(self.spec, args), partial(names_of, self.spec, args)
        if not is_compiling():  # which refuses to read a layout in some graphs; the tensors of graphs are dense
            checks.require_dense(self.spec.name, tensors, names)
        checks.require_one_device(self.spec.name, tensors, names)
        return self.meta(*args)

    def spread(self, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
        """Return the arguments with those of `nested` in its place if it is given."""
        if self._nested_at is not None and type(args[-1]) is Nested:
            return args[:-1] + args[-1]
        return args

    def look_up(self, args: Tuple[Any, ...], plain_only: bool = False) -> Tuple[Tuple[Any, ...], Tensors, Any]:
        """Return the arguments as the spec has them, the tensors among them, and the call's signature.

        With `plain_only` there is no signature, but None, where a tensor is not plain.
        """
        flat = self.spread(args)
        form = self._forms.get(tuple(map(type, flat)))
        if form is None:
            return self.look_up(self._add_form(args), plain_only)
        if plain_only and not form.plain:
            return args, (), None
        tensors = form.tensors(flat)
        try:
            key: Any = (tuple(map(_describe, tensors)), form.numbers(flat))
        except RuntimeError:  # a nested tensor has no shape; the checks will say so
            key = None
        signature = form.signatures.get(key)
        if signature is None:
            signature = _Signature(self, args, tensors)
            if len(form.signatures) >= _MOST_SIGNATURES:
                form.signatures.clear()
            form.signatures[key] = signature
        return args, tensors, signature

    def _add_form(self, args: Tuple[Any, ...]) -> Tuple[Any, ...]:
        args = conform(self.spec, args)
        flat = args if self._nested_at is None or args[-1] is None else args[:-1] + args[-1]
        self._forms.setdefault(tuple(map(type, flat)), _Form(flat, self._tensors_at))
        return args

    def _run_with_grad(self, args: Tuple[Any, ...], tensors: Tensors, signature: _Signature, out: Any) -> Any:
        if signature.differentiable:
            if out is not None:
                self._refuse_out()
            bias = args[self.bias_at] if self.bias_at is not None else None
            return LinearFunction.apply(self, (args, tensors, signature), args[0], bias)
        with torch.no_grad():  # what a kernel does to its arguments is no part of autograd's graph
            return self.run_direct(args, tensors, signature, out)

    def run_direct(self, args: Tuple[Any, ...], tensors: Tensors, signature: _Signature, out: Any = None) -> Any:
        """Run the kernel of a call that has been looked up."""
        for tensor in tensors:
            if not tensor.is_contiguous() or tensor.is_neg():
                args = _contiguous(args)
                break
        if self.check_values is not None and signature.device.type == "cpu":
            self.check_values(*args)
        if out is None:
            results = targets = [allocate() for allocate in signature.allocators]
        else:
            results = check_out(self.spec, out, signature.outputs, signature.device)
            targets = targets_for(results, tensors)
        if signature.runs:
            self._run_kernel(args, args[self._first_at], out=targets[0] if len(targets) == 1 else tuple(targets))
        elif signature.device.type != "meta":
            self._run_empty(args, targets)
        if out is not None:
            store(targets, results)
            return out
        return results[0] if len(results) == 1 else tuple(results)

    def _run_kernel(self, args: Tuple[Any, ...], first: torch.Tensor, **keywords: Any) -> None:
        dtype = first.dtype if self._dtype_at is None else args[self._dtype_at]
        kernel = dispatch.resolve(self.spec, first.device, dtype, args)
        if kernel.scratch is not None:
            size = kernel.scratch(Call(self.spec, args))
            keywords["scratch"] = torch.empty(size, dtype=torch.uint8, device=first.device) if size else _no_scratch(first.device)
        kernel_args = args if self._kernel_arguments is None else self._kernel_arguments(args)
        try:
            kernel.function(*kernel_args[: kernel.arity], **keywords)
        except Exception as error:
            dispatch.note_failure(error, kernel, first.device)
            raise

    def _run_empty(self, args: Tuple[Any, ...], targets: Sequence[torch.Tensor]) -> None:
        """Fill outputs that do not depend on any element: a sum over nothing is zero, and the bias is added to it."""
        for target in targets:
            target.zero_()
        bias = args[self.bias_at] if self.bias_at is not None else None
        if bias is not None:
            targets[0].add_(bias)

    # ------------------------------------------------------------------------------------------------------------- the dispatcher

    def dispatch(self, args: Tuple[Any, ...], out: Any = None) -> Any:
        """Run the op through torch, on arguments of the right Python types.

        Raises:
            InvalidArgumentError: the arguments or `out` do not fit the op, or a tensor is a DTensor.
            OpNotSupportedError: this torch is too old to have the op.
        """
        if not REGISTERED:
            raise OpNotSupportedError(
                f"{self.spec.name}: torch.jit.trace and torch.func need torch 2.4 or newer, this is {torch.__version__}; "
                "call it outside them"
            )
        if not is_compiling():
            refuse_sharded(self.spec.name, tensors_of(self.spec, args), partial(names_of, self.spec, args))
        if is_compiling() or out is not None:
            outputs = self.check(args)  # where torch traces, an error of its own Meta kernel would have lost its type
        if out is not None:
            if torch.is_grad_enabled() and needs_gradient(self, args):
                self._refuse_out()
            results = check_out(self.spec, out, outputs, self.first_of(args).device)
        flat = flatten(self.spec, args)
        result = TransformedFunction.apply(self, *flat) if transforms_differentiate() else self.torch_op(*flat)
        if out is None:
            return result
        store(result if isinstance(result, tuple) else (result,), results)
        return out

    def first_of(self, args: Tuple[Any, ...]) -> torch.Tensor:
        """Return the tensor that the op is dispatched by."""
        first: torch.Tensor = args[self._first_at]
        return first

    @property
    def adjoint_op(self) -> "StructuredOp":
        """The op that `adjoint` names."""
        assert isinstance(self.adjoint, str)
        return _ops[self.adjoint]

    def _refuse_out(self) -> None:
        raise InvalidArgumentError(
            f"{self.spec.name}: out is given and an argument requires grad, but no gradient passes through out; "
            "leave out away, or use torch.no_grad()"
        )


def _contiguous(args: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """Copy the tensors whose elements do not lie one after the other, or are to be read with another sign."""

    def contiguous(value: Any) -> Any:
        return value.contiguous().resolve_neg() if isinstance(value, torch.Tensor) else value

    return tuple(Nested(*map(contiguous, value)) if isinstance(value, Nested) else contiguous(value) for value in args)


@lru_cache(maxsize=None)
def _no_scratch(device: torch.device) -> torch.Tensor:
    """Return a tensor without elements: to allocate one anew takes as long as to allocate memory."""
    return torch.empty(0, dtype=torch.uint8, device=device)


def _picker(positions: Sequence[int]) -> Callable[[Tuple[Any, ...]], Tuple[Any, ...]]:
    """Return a function that picks these positions out of a tuple: what `itemgetter` does for two and more, or for a slice."""
    if len(positions) > 1:
        return itemgetter(*positions)
    first = positions[0] if positions else 0
    return itemgetter(slice(first, first + len(positions)))


def structured_op(name: str) -> StructuredOp:
    """Return the op of that name in `OPS`; it takes the op's arguments by position, complete."""
    from bnb_core import ops

    getattr(ops, name)  # loads the family that defines it
    return _ops[name]
