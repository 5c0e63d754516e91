"""How packed 4-bit codes lie in memory: bytes, in a column of any dtype that bytes can be reinterpreted as (`quant_storage`)."""

from __future__ import annotations

from typing import Dict

import torch

from bnb_core.errors import InvalidArgumentError

_NAMES = (
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
#: Dtypes that only reinterpret the bytes, and the bytes of an element: every bit pattern stays as it is when copied or saved.
#: Older torch lacks some.
STORAGE_DTYPES: Dict[torch.dtype, int] = {
    getattr(torch, name): torch.empty((), dtype=getattr(torch, name)).element_size() for name in _NAMES if hasattr(torch, name)
}


def require_storage(function: str, dtype: torch.dtype, numel: int) -> None:
    """Refuse dtypes that cannot hold the packed codes of `numel` elements.

    Raises:
        InvalidArgumentError: the dtype does not keep bytes as they are, or the codes do not fill its elements.
    """
    if dtype not in STORAGE_DTYPES:
        names = ", ".join(str(accepted) for accepted in STORAGE_DTYPES)
        raise InvalidArgumentError(f"{function}: quant_storage is {dtype}; it must be one of {names}")
    size, packed = STORAGE_DTYPES[dtype], (numel + 1) // 2
    if packed % size:
        raise InvalidArgumentError(
            f"{function}: {numel} elements are packed in {packed} bytes, which do not fill elements of quant_storage {dtype} "
            f"({size} bytes each); use torch.uint8"
        )


def as_storage(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View packed bytes, uint8 [bytes], as bitsandbytes keeps them: a column [bytes / itemsize, 1] of `dtype`."""
    return (packed if dtype == torch.uint8 else packed.view(dtype)).view(-1, 1)


def as_bytes(stored: torch.Tensor) -> torch.Tensor:
    """Return the packed bytes, uint8 [bytes], of a tensor of any shape and dtype; a view of it where it is contiguous."""
    if stored.dtype != torch.uint8:
        stored = stored.detach().reshape(-1).view(torch.uint8)
    return stored.reshape(-1)
