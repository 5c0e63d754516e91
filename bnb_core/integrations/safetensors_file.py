"""Read and write safetensors files a piece at a time, so that no more than a piece of them is ever in memory.

A file is a length (8 bytes, little-endian), a JSON header with a dtype, shape and place for each name, then the tensors' bytes
without gaps. Files are read by ordinary reads, which leave no pages of theirs mapped into the process. A file is not trusted: its
header is checked before anything is read by it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple, Union

import torch

from bnb_core.errors import CheckpointError

#: Bytes that are read, written or moved to a device at a time.
PIECE = 1 << 24
#: Tensors begin at multiples of their elements' sizes, the largest of which is this.
ALIGNMENT = 8
#: The longest header that other readers accept.
_MAX_HEADER = 100_000_000

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}
#: Older torch lacks some.
DTYPES: Dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file: its dtype's code, its shape, and where its bytes are."""

    dtype: str
    shape: Tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor."""
        return self.stop - self.start


class SafetensorsReader:
    """A safetensors file that is open for reading; a context manager.

    Args:
        path: the file.

    Attributes:
        entries: its tensors by name.
        metadata: its texts by name.

    Raises:
        CheckpointError: it is no such file, or a damaged one.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def load(self, name: str, device: Union[torch.device, str] = "cpu") -> torch.Tensor:
        """Return a tensor on a device; no second copy of it is made on the way."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is {entry.dtype}, which this torch does not have")
        result = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=device)
        flat = result.view(-1)
        step = PIECE // result.element_size()
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            position = entry.start + first * result.element_size()
            if result.device.type == "cpu":
                self._fill(position, part)
            else:
                part.copy_(self._fill(position, torch.empty(part.shape, dtype=part.dtype)))
        return result

    def load_rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return the rows from `first` up to but not including `last` of a matrix, on the CPU."""
        entry = self.entries[name]
        rows = torch.empty((last - first, entry.shape[1]), dtype=DTYPES[entry.dtype])
        self._fill(entry.start + first * entry.shape[1] * rows.element_size(), rows.view(-1))
        return rows

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the bytes of a tensor, at most `PIECE` at a time."""
        entry = self.entries[name]
        for position in range(entry.start, entry.stop, PIECE):
            yield self._fill(position, torch.empty(min(PIECE, entry.stop - position), dtype=torch.uint8))

    def _fill(self, position: int, tensor: torch.Tensor) -> torch.Tensor:
        """Read into a tensor of one dimension."""
        view = tensor.view(torch.uint8).numpy().data
        self._file.seek(position)
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise CheckpointError(f"{self.path} ends early: it was cut off while it was being read")
            view = view[count:]
        return tensor

    def _read_header(self) -> Tuple[Dict[str, Entry], Dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{self.path} is no safetensors file, or is cut off: its header would be {length} of {size} bytes"
            )
        raw = bytes(self._fill(8, torch.empty(length, dtype=torch.uint8)).numpy())
        try:
            header = json.loads(raw.decode("utf-8"))
            metadata = header.pop("__metadata__", {})
            entries = {
                name: Entry(value["dtype"], tuple(value["shape"]), *(8 + length + offset for offset in value["data_offsets"]))
                for name, value in header.items()
            }
            consistent = all(map(_is_consistent, entries.values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: the header is damaged ({type(error).__name__}: {error})") from error
        end = 8 + length
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
            consistent = consistent and entry.start == end
            end = entry.stop
        if not consistent or end != size:
            raise CheckpointError(f"{self.path} is damaged or cut off: its tensors do not fill its {size} bytes")
        return entries, metadata


def _is_consistent(entry: Entry) -> bool:
    """Say whether a tensor's size fits its shape."""
    if not isinstance(entry.dtype, str) or not all(isinstance(number, int) for number in (*entry.shape, entry.start, entry.stop)):
        return False
    if min(entry.shape, default=0) < 0:
        return False
    if entry.dtype not in DTYPES:
        return entry.nbytes >= 0
    return entry.nbytes == math.prod(entry.shape) * torch.empty((), dtype=DTYPES[entry.dtype]).element_size()


class SafetensorsWriter:
    """A safetensors file that is written tensor by tensor; the header, of which there must be room, is written at the end.

    Tensors whose bytes are no multiple of 8 wait for the end, so that all others are aligned; they should be few or small.

    Args:
        path: the file, which appears when it is finished; until then, its name has ".part" appended.
        room: bytes to keep for the header: at least the sum of `header_bytes` over the tensors.
        metadata: texts by name.
    """

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._header: Dict[str, Any] = {"__metadata__": dict(metadata)}
        self._room = -(-(room + len(json.dumps(self._header))) // ALIGNMENT) * ALIGNMENT
        self._digest = hashlib.sha256()
        self._offset = 0
        self._waiting: List[Tuple[str, str, Sequence[int], int, Iterable[torch.Tensor]]] = []
        self._part = path.with_name(path.name + ".part")
        self._file = self._part.open("wb", buffering=0)
        self._file.seek(8 + self._room)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, from any device."""
        tensor = tensor.detach().contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        self.add_pieces(name, CODES[tensor.dtype], tensor.shape, nbytes, _split(tensor))

    def add_pieces(self, name: str, dtype: str, shape: Sequence[int], nbytes: int, pieces: Iterable[torch.Tensor]) -> None:
        """Write a tensor that comes in pieces, uint8 on the CPU. If `nbytes` is no multiple of 8, they are asked for at the end."""
        if nbytes % ALIGNMENT:
            self._waiting.append((name, dtype, shape, nbytes, pieces))
        else:
            self._write(name, dtype, shape, nbytes, pieces)

    def finish(self) -> str:
        """Write what waits, then the header; return a SHA-256 of the content, as `content_digest` computes it."""
        for waiting in sorted(self._waiting, key=lambda entry: -_alignment(entry[1])):
            self._write(*waiting)
        header = json.dumps(self._header, separators=(",", ":")).encode("utf-8")
        assert len(header) <= self._room
        header = self._room.to_bytes(8, "little") + header.ljust(self._room)
        self._file.seek(0)
        self._write_bytes(memoryview(header))
        self._digest.update(header)
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)
        return self._digest.hexdigest()

    def _write(self, name: str, dtype: str, shape: Sequence[int], nbytes: int, pieces: Iterable[torch.Tensor]) -> None:
        start = self._offset
        for piece in pieces:
            data = piece.numpy().data
            self._write_bytes(data)
            self._digest.update(data)
            self._offset += len(data)
        assert self._offset - start == nbytes
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, self._offset]}

    def _write_bytes(self, data: memoryview) -> None:
        while len(data):
            data = data[self._file.write(data) :]


def header_bytes(name: str, dimensions: int) -> int:
    """Return the most bytes that a tensor of that name takes in a header."""
    return len(json.dumps(name)) + 80 + 21 * (dimensions + 2)


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file's tensors, then its header: the order in which they are written.

    Raises:
        CheckpointError: it is no safetensors file.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = file.read(8)
        header += file.read(min(int.from_bytes(header, "little"), _MAX_HEADER))
        for piece in iter(lambda: file.read(PIECE), b""):
            digest.update(piece)
    digest.update(header)
    return digest.hexdigest()


def as_pieces(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor, uint8 [bytes] on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).cpu()


def _split(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    step = PIECE // flat.element_size()
    for first in range(0, flat.numel(), step):
        yield as_pieces(flat[first : first + step])


def _alignment(dtype: str) -> int:
    return torch.empty((), dtype=DTYPES[dtype]).element_size() if dtype in DTYPES else ALIGNMENT
