"""Results for tensors that the caller gave, where an op does not fill them itself."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.errors import InvalidArgumentError


def deliver(function: str, result: torch.Tensor, out: Optional[torch.Tensor], name: str = "out") -> torch.Tensor:
    """Return `result`, in `out` if that is given.

    Raises:
        InvalidArgumentError: `out` has another shape, dtype or device than the result.
    """
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype or out.device != result.device:
        raise InvalidArgumentError(
            f"{function}: {name} is {out.dtype} {list(out.shape)} on {out.device}; "
            f"it must be {result.dtype} {list(result.shape)} on {result.device}"
        )
    return out.copy_(result)
