"""A backend whose kernels are another backend's: it records the calls, and lets a test put its own in place of some."""

from __future__ import annotations

import functools
from typing import Any, Callable, List, Mapping, Optional

import torch

from bnb_core.backends import Backend, get_backend

#: Takes a kernel and returns the function that runs in its place, with the same parameters.
Wrapper = Callable[[Callable[..., None]], Callable[..., None]]


class Loopback:
    """A backend that forwards each call to another backend's kernel and records the op's name.

    Register it before use: `bnb_core.backends.register(Loopback().backend)`.

    Args:
        name: name of the new backend.
        inner: name of the backend that does the work.
        priority: of the new backend. The default leaves it out of automatic selection while `inner` is there.
        wrappers: by op name, what to make of a kernel of `inner`, such as one that spoils its result.

    Attributes:
        backend: the backend.
        calls: names of the ops that ran on it, in order.
    """

    def __init__(
        self,
        name: str = "loopback",
        inner: str = "reference",
        priority: int = -100,
        wrappers: Optional[Mapping[str, Wrapper]] = None,
    ) -> None:
        self.backend = Backend(name, api_version=get_backend(inner).api_version, priority=priority)
        self.calls: List[str] = []
        for op, kernel in get_backend(inner).kernels.items():
            function = (wrappers or {}).get(op, lambda original: original)(kernel.function)
            dtypes = [getattr(torch, dtype) for dtype in kernel.dtypes]
            self.backend.kernel(op, devices=kernel.devices, dtypes=dtypes, when=kernel.when, scratch=kernel.scratch)(
                self._recording(op, kernel.function, function)
            )

    def _recording(self, op: str, original: Callable[..., None], function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)  # whose parameters are checked against the op's
        def forward(*args: Any, **keywords: Any) -> None:
            self.calls.append(op)
            function(*args, **keywords)

        return forward
