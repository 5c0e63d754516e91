"""Allocate outputs, or fill tensors that the caller gives, whatever their strides and whatever else lies in their memory."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, List, Sequence, Tuple

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops import checks
from bnb_core.ops.plain import is_plain
from bnb_core.ops.spec import OpSpec

#: Shape and dtype of one output.
Output = Tuple[Sequence[Any], torch.dtype]


#: Allocate on the CPU or on the current CUDA device, as graphs of torch.compile do: two to three times as fast as `torch.empty`,
#: which has more arguments to read. From torch 2.2 on.
_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_EMPTY_STRIDED = {name: getattr(_guards, f"_empty_strided_{name}", None) for name in ("cpu", "cuda")}
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)


def allocator(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return what allocates a contiguous tensor, as fast as can be."""
    shape, strides = tuple(shape), contiguous_strides(shape)
    anywhere = partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    empty_strided, index = _EMPTY_STRIDED.get(device.type), device.index
    if empty_strided is None:
        return anywhere
    if device.type == "cpu":
        return partial(empty_strided, shape, strides, dtype)
    return lambda: empty_strided(shape, strides, dtype) if _current_device() == index else anywhere()


def contiguous_strides(shape: Sequence[int]) -> Tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides[: len(shape)]))


def check_out(spec: OpSpec, out: Any, outputs: Sequence[Output], device: torch.device) -> List[torch.Tensor]:
    """Return the tensors of `out` as a list, or refuse it because it does not fit the outputs of the op."""
    if len(outputs) == 1:
        tensors = [out]
    elif isinstance(out, (tuple, list)) and len(out) == len(outputs):
        tensors = list(out)
    else:
        names = ", ".join(name for name, _ in spec.outputs)
        given = f"{len(out)} of them" if isinstance(out, (tuple, list)) else f"a {type(out).__name__}"
        raise InvalidArgumentError(f"{spec.name}: out is {given}; pass a tuple of {len(outputs)} tensors: {names}")
    for (name, _), (shape, dtype), tensor in zip(spec.outputs, outputs, tensors):
        checks.require_out(spec.name, name, tensor, tuple(shape), dtype, device)
    return tensors


def targets_for(results: List[torch.Tensor], arguments: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Return what a kernel may write to in place of `results`: these, or new tensors where their memory has gaps or other users."""
    return [
        result
        if is_plain([result])
        and result.is_contiguous()
        and not result.is_neg()
        and not any(_overlap(result, other) for other in (*arguments, *results[:i], *results[i + 1 :]))
        else torch.empty(result.shape, dtype=result.dtype, device=result.device)
        for i, result in enumerate(results)
    ]


def store(targets: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
    """Copy what a kernel has written to where it was asked for, and let autograd know that this has changed."""
    for target, result in zip(targets, results):
        if target is not result:
            result.copy_(target)
    mark_written([result for target, result in zip(targets, results) if target is result])


def _make_mark_written() -> Callable[[Sequence[torch.Tensor]], None]:
    increment: Any = getattr(getattr(torch.autograd, "graph", None), "increment_version", None)
    if increment is None:  # below torch 2.1; a tensor shares its version with what it is detached to

        def increment(tensor: torch.Tensor) -> None:
            tensor.detach().as_strided((0,), (1,)).zero_()

    try:
        increment([])
    except (AttributeError, RuntimeError, TypeError):  # not yet for several tensors at a time

        def increment_each(tensors: Sequence[torch.Tensor]) -> None:
            for tensor in tensors:
                increment(tensor)

        return increment_each
    return increment


#: Increase the versions of tensors, by which autograd finds that one which it has saved was written to since.
mark_written = _make_mark_written()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors, if they are contiguous, have memory in common."""
    start, other = a.data_ptr(), b.data_ptr()
    return start < other + b.numel() * b.element_size() and other < start + a.numel() * a.element_size()
