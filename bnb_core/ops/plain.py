"""Whether a call may run its kernel directly, or must go through the torch dispatcher: `ordinary_execution` and `is_plain`.

The direct way saves most of a call's host time. It is right only for ordinary tensors in ordinary eager execution: under vmap,
func.grad, jit.trace or make_fx `type(x) is torch.Tensor` still holds, and a kernel's result would be baked in silently.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, Set

import torch

#: Whether `torch.ops.bnb.*` exist. Older torch has no way to register the autograd of an op that is needed here; there, calls run
#: directly or, where that would be wrong, not at all.
REGISTERED = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 4)

_DIFFERENTIATING = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp) if REGISTERED else ()
#: Say whether torch.compile or torch.export is tracing this call.
is_compiling: Callable[[], bool] = torch.compiler.is_compiling if REGISTERED else lambda: False

_plain_types: Set[type] = {torch.Tensor, torch.nn.Parameter}


def add_plain_type(cls: type) -> type:
    """Declare a tensor subclass whose data is that of an ordinary tensor, as bnb_core's parameter classes are."""
    _plain_types.add(cls)
    return cls


def _make_ordinary_execution() -> Callable[[], bool]:
    tracing_state = torch._C._get_tracing_state
    if not hasattr(torch._C, "_functorch"):
        return lambda: tracing_state() is None
    innermost_transform = torch._C._functorch.peek_interpreter_stack
    if not REGISTERED:
        return lambda: tracing_state() is None and innermost_transform() is None
    dispatch_modes = torch._C._len_torch_dispatch_stack
    forward_ad = torch.autograd.forward_ad

    def ordinary_execution() -> bool:
        return not (
            is_compiling()
            or dispatch_modes()
            or tracing_state() is not None
            or innermost_transform() is not None
            or forward_ad._current_level >= 0
        )

    return ordinary_execution


#: Say whether no compiler, tracer, dispatch mode, function transform or forward-mode differentiation is active.
ordinary_execution = _make_ordinary_execution()


def transforms_differentiate() -> bool:
    """Say whether torch.func or forward-mode differentiation takes derivatives now, which torch.library's ops do not know.

    Never true while compiling, where what torch.func does to the ops of a graph is up to the compiler.
    """
    if is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() in _DIFFERENTIATING for transform in transforms)


def is_plain(tensors: Iterable[Any]) -> bool:
    """Say whether all these tensors are ordinary ones, whose memory a kernel may use."""
    return _plain_types.issuperset(map(type, tensors))
