"""The reference backend: every op in plain PyTorch, written to be read."""

from __future__ import annotations

from typing import List

from bnb_core.backends import Backend, hookimpl

__version__ = "0.1.0"

backend = Backend("reference", api_version=(1, 0), priority=0, description="plain PyTorch")

from bnb_reference import quantize  # noqa: E402  (the kernels register themselves on `backend`)

__all__ = ["backend", "quantize"]


@hookimpl
def bnb_backends() -> List[Backend]:
    """Provide the backend."""
    return [backend]
