"""Read the entries of a quantized state from a checkpoint, which is not trusted: each is checked before any is used."""

from __future__ import annotations

import json
import math
from typing import Any, Dict, List, Mapping, Tuple

import torch

from bnb_core.errors import CheckpointError, InvalidArgumentError
from bnb_core.ops.checks import FLOAT_DTYPES, ceil_div
from bnb_core.ops.spec import BLOCKSIZES_4BIT
from bnb_core.quantization.codebooks import get_codebook

#: Start of the key of the entries that are not tensors, saved as JSON; the quant type follows.
PACKED_PREFIX = "bitsandbytes__"
#: Such JSON has under 300 bytes; anything longer than this is not read.
_MAX_JSON_BYTES = 16384

_TENSOR_KEYS = ("absmax", "quant_map")
_OTHER_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_TENSOR_KEYS = ("nested_absmax", "nested_quant_map")
_NESTED_OTHER_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
#: Every entry, in bitsandbytes' names. The nested ones are all there or none.
KEYS = _TENSOR_KEYS + _NESTED_TENSOR_KEYS + _OTHER_KEYS + _NESTED_OTHER_KEYS


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as checkpoints have it, such as "bfloat16"."""
    return str(dtype).split(".")[1]


def pack_dict_to_tensor(source_dict: Mapping[str, Any]) -> torch.Tensor:
    """Return a dictionary as the bytes of its JSON, uint8 [length] on the CPU, which safetensors can store."""
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8, device="cpu")


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> Dict[str, Any]:
    """Return the dictionary that `pack_dict_to_tensor` packed.

    Raises:
        CheckpointError: the tensor holds something else.
    """
    return _unpack_json("a packed dictionary", tensor_data)


_DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}


def read_entries(source: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the entries of a state by the names in `KEYS`, with dtypes, shape and numbers in their own types.

    Raises:
        CheckpointError: an entry is missing, unknown or given twice, has a wrong dtype, or does not fit the others.
    """
    entries, packed = _sort(source)
    if packed:
        entries.update(_unpack(packed, entries))
    nested = any(key in entries for key in _NESTED_TENSOR_KEYS + _NESTED_OTHER_KEYS)
    missing = [key for key in (KEYS if nested else _TENSOR_KEYS + _OTHER_KEYS) if key not in entries]
    if missing:
        raise CheckpointError(
            f"quantized state: {', '.join(missing)} missing; found {', '.join(sorted(map(str, source))) or 'nothing'}. "
            "Load all the entries of the tensor together"
        )
    four_bit = _check_quant_type(entries["quant_type"])
    blocksizes = f"one of {', '.join(map(str, BLOCKSIZES_4BIT))}" if four_bit else "positive"
    blocksize = entries["blocksize"]
    if not _is_size(blocksize) or blocksize == 0 or (four_bit and blocksize not in BLOCKSIZES_4BIT):
        raise CheckpointError(f"quantized state: blocksize is {blocksize!r}; it must be {blocksizes}")
    entries["dtype"] = _read_dtype("dtype", entries["dtype"], _DTYPES)
    _check_tensor("quant_map", entries["quant_map"], torch.float32, 16 if four_bit else 256)
    if entries["shape"] is not None or four_bit:
        entries["shape"] = _read_shape(entries["shape"])
        blocks = ceil_div(math.prod(entries["shape"]), blocksize)
    else:
        blocks = None
    _check_tensor("absmax", entries["absmax"], torch.uint8 if nested else torch.float32, blocks)
    if nested:
        _check_nested(entries)
    return entries


def _sort(source: Mapping[str, Any]) -> Tuple[Dict[str, Any], List[Tuple[str, Any]]]:
    """Strip prefixes, and set apart what is packed."""
    entries: Dict[str, Any] = {}
    packed: List[Tuple[str, Any]] = []
    for key, value in source.items():
        name = str(key).rsplit(".", 1)[-1]
        if name.startswith(PACKED_PREFIX):
            packed.append((name[len(PACKED_PREFIX) :], value))
        elif name not in KEYS:
            raise CheckpointError(f"quantized state: unknown entry {key!r}; the entries are {', '.join(KEYS)}")
        elif name in entries:
            raise CheckpointError(f"quantized state: two entries named {name!r}; pass those of one tensor at a time")
        else:
            entries[name] = value
    if len(packed) > 1:
        types = ", ".join(repr(quant_type) for quant_type, _ in packed)
        raise CheckpointError(f"quantized state: packed entries of several quant types ({types}); there must be one")
    return entries, packed


def _unpack(packed: List[Tuple[str, Any]], entries: Mapping[str, Any]) -> Dict[str, Any]:
    ((quant_type, tensor),) = packed
    name = f"{PACKED_PREFIX}{quant_type}"
    if isinstance(tensor, torch.Tensor) and tensor.numel() > _MAX_JSON_BYTES:
        raise CheckpointError(f"quantized state: {name} has {tensor.numel()} bytes; it must be JSON of at most {_MAX_JSON_BYTES}")
    others = _unpack_json(name, tensor)
    for key in others:
        if key not in _OTHER_KEYS + _NESTED_OTHER_KEYS or key in entries:
            raise CheckpointError(
                f"quantized state: {name} holds {key!r}, which {'is given twice' if key in entries else 'is unknown there'}; "
                f"its entries are {', '.join(_OTHER_KEYS + _NESTED_OTHER_KEYS)}"
            )
    if others.get("quant_type") != quant_type:
        raise CheckpointError(f"quantized state: {name} says quant_type {others.get('quant_type')!r}; the two must agree")
    return others


def _unpack_json(name: str, tensor: Any) -> Dict[str, Any]:
    _check_tensor(name, tensor, torch.uint8, None)
    if tensor.device.type == "meta":
        raise CheckpointError(f"quantized state: {name} is on the meta device, where it has no bytes; load it to another")
    try:
        unpacked = json.loads(bytes(tensor.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"quantized state: {name} is not JSON ({type(error).__name__}); the checkpoint is damaged") from error
    if not isinstance(unpacked, dict):
        raise CheckpointError(f"quantized state: {name} is a JSON {type(unpacked).__name__}; it must be an object")
    return unpacked


def _check_quant_type(quant_type: Any) -> bool:
    """Say whether the type is a 4-bit one."""
    if quant_type is None:
        return False
    try:
        entries = get_codebook(quant_type).numel() if isinstance(quant_type, str) else 0
    except InvalidArgumentError as error:
        raise CheckpointError(f"quantized state: {error}. A plugin may provide it") from error
    if entries != 16:
        raise CheckpointError(f"quantized state: quant_type is {quant_type!r}; it must be a 4-bit type, or None for 8-bit codes")
    return True


def _check_tensor(name: str, value: Any, dtype: torch.dtype, numel: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"quantized state: {name} is a {type(value).__name__}; it must be a tensor")
    if value.dtype != dtype or value.dim() != 1 or (numel is not None and value.numel() != numel):
        size = "" if numel is None else str(numel)
        raise CheckpointError(
            f"quantized state: {name} is {value.dtype} {list(value.shape)}; the other entries need {dtype} [{size}]"
        )


def _check_nested(entries: Dict[str, Any]) -> None:
    blocksize, offset = entries["nested_blocksize"], entries["nested_offset"]
    if not _is_size(blocksize) or blocksize == 0:
        raise CheckpointError(f"quantized state: nested_blocksize is {blocksize!r}; it must be positive")
    # Scales of scales in another dtype would have been rounded twice, and no version of bitsandbytes writes them.
    entries["nested_dtype"] = _read_dtype("nested_dtype", entries["nested_dtype"], {"float32": torch.float32})
    is_number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
    if not is_number or torch.finfo(torch.float32).max < abs(offset) < math.inf:
        raise CheckpointError(f"quantized state: nested_offset is {offset!r}; it must be a float32 number")
    _check_tensor("nested_quant_map", entries["nested_quant_map"], torch.float32, 256)
    _check_tensor("nested_absmax", entries["nested_absmax"], torch.float32, ceil_div(entries["absmax"].numel(), blocksize))


def _read_dtype(name: str, value: Any, accepted: Mapping[str, torch.dtype]) -> torch.dtype:
    if not isinstance(value, str) or value not in accepted:
        raise CheckpointError(f"quantized state: {name} is {value!r}; it must be {' or '.join(map(repr, accepted))}")
    return accepted[value]


def _read_shape(value: Any) -> torch.Size:
    if not isinstance(value, (list, tuple)) or not all(map(_is_size, value)):
        raise CheckpointError(f"quantized state: shape is {value!r}; it must be a list of sizes")
    return torch.Size(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
