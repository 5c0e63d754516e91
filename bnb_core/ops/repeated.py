"""Call an op again and again with the same weight: `Repeated` checks in full once, and then at a glance."""

from __future__ import annotations

from operator import attrgetter, is_
from typing import Any, NamedTuple, Optional, Tuple

import torch

from bnb_core.ops.structured import StructuredOp

_kind = attrgetter("shape", "dtype", "layout", "device")
_address = torch.Tensor.data_ptr


class _Last(NamedTuple):
    """What the last call looked like, and what had been found out about it."""

    x: Tuple[Any, ...]
    """The kind of the input."""
    codes: Tuple[int, torch.dtype]
    """How many codes the weight has, and their dtype."""
    rest: Tuple[Any, ...]
    """The arguments after the codes."""
    tensors: Tuple[torch.Tensor, ...]
    """Those among them that are tensors."""
    addresses: Tuple[int, ...]
    """Where the data are of the codes and of these tensors."""
    signature: Any


class Repeated:
    """An op of which the first argument is an input and the second the codes of a weight.

    It is called in ordinary execution, and where no gradient will be asked for.

    To look at every tensor takes longer than a small product. So a call is taken for a repetition of the last one if its input is
    of the same kind, its codes are where they were, and all other arguments are the same objects, their data where they were.

    Args:
        op: the op.
    """

    __slots__ = ("_last", "_op")

    def __init__(self, op: StructuredOp) -> None:
        self._op = op
        self._last: Optional[_Last] = None

    def __call__(self, *args: Any) -> Any:
        """Run the op, on all its arguments by position.

        Raises:
            InvalidArgumentError: the arguments do not fit the op.
        """
        if self._last is not None:
            kind, of_codes, last_rest, tensors, addresses, signature = self._last
            x, codes, *rest = self._op.spread(args)
            if (
                type(x) is type(codes) is torch.Tensor
                and not x.is_nested  # which has no shape
                and _kind(x) == kind
                and x.is_contiguous()
                and not x.is_neg()
                and (codes.numel(), codes.dtype) == of_codes
                and codes.is_contiguous()
                and len(rest) == len(last_rest)
                and all(map(is_, rest, last_rest))
                and (_address(codes), *map(_address, tensors)) == addresses
            ):
                return self._op.run_direct(args, (), signature)
        result = self._op.call(args)
        self._last = self._description(args)
        return result

    def _description(self, args: Tuple[Any, ...]) -> Optional[_Last]:
        conformed, tensors, signature = self._op.look_up(args, plain_only=True)
        x, codes, *rest = self._op.spread(args)
        same = all(map(is_, self._op.spread(conformed), (x, codes, *rest)))
        if signature is None or not same or not all(tensor.is_contiguous() and not tensor.is_neg() for tensor in tensors):
            return None
        addresses = tuple(map(_address, tensors[1:]))
        return _Last(_kind(x), (codes.numel(), codes.dtype), tuple(rest), tensors[2:], addresses, signature)
