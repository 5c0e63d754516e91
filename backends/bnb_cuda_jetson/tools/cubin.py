"""Read what kernels need off a cubin: registers, stack and shared memory. A cubin is an ELF file of 64 bits."""

from __future__ import annotations

import struct
from typing import Dict, Iterator, List, NamedTuple, Tuple

# Attributes of a cubin's .nv.info section: format, attribute, size, then a symbol's index and a value.
_FORMAT_SIZED = 0x04
_MIN_STACK_SIZE = 0x12
_REGISTER_COUNT = 0x2F

#: Before CUDA 13 the number was 0x33.
_OS_ABI_OF_CUDA_13 = 0x41


class Kernel(NamedTuple):
    """The needs of one kernel."""

    name: str
    registers: int
    stack: int
    """Bytes of local memory a thread: spilled registers, and arrays that are not in registers."""
    shared: int
    """Bytes of shared memory of fixed size."""


class Header(NamedTuple):
    """What the ELF header says about the code."""

    os_abi: int
    abi_version: int
    toolkit: int
    """The version of CUDA that compiled it, such as 118."""
    flags: int


def header(code: bytes) -> Header:
    """Read the ELF header."""
    return Header(code[7], code[8], struct.unpack_from("<I", code, 20)[0], struct.unpack_from("<I", code, 48)[0])


def architecture(code: bytes) -> int:
    """Return the compute capability that the code is for, without the dot: in the ELF header, where depends on its format."""
    found = header(code)
    return found.flags >> 8 & 0xFF if found.os_abi == _OS_ABI_OF_CUDA_13 else found.flags & 0xFF


def kernels(code: bytes) -> List[Kernel]:
    """List the kernels of a cubin."""
    contents = sections(code)
    symbols = _symbol_names(contents)
    stacks, registers = _attributes(contents.get(".nv.info", b""))
    found = []
    for name in contents:
        if name.startswith(".text."):
            kernel = name[len(".text.") :]
            index = symbols.get(kernel, -1)
            shared = len(contents.get(f".nv.shared.{kernel}", b"")) or _sizes(code).get(f".nv.shared.{kernel}", 0)
            found.append(Kernel(kernel, registers.get(index, 0), stacks.get(index, 0), shared))
    return sorted(found)


def _headers(code: bytes) -> Iterator[Tuple[int, int, int, int]]:
    """Yield name offset, type, offset and size of each section."""
    (table,) = struct.unpack_from("<Q", code, 40)
    entry_size, count = struct.unpack_from("<HH", code, 58)
    for at in range(table, table + entry_size * count, entry_size):
        name, kind = struct.unpack_from("<II", code, at)
        offset, size = struct.unpack_from("<QQ", code, at + 24)
        yield name, kind, offset, size


def _named(code: bytes) -> Iterator[Tuple[str, int, int, int]]:
    headers = list(_headers(code))
    (names_at,) = struct.unpack_from("<H", code, 62)
    names = headers[names_at][2]
    for name, kind, offset, size in headers:
        yield code[names + name : code.index(b"\0", names + name)].decode(), kind, offset, size


def sections(code: bytes) -> Dict[str, bytes]:
    """Return the contents of the sections of an ELF file by name."""
    no_bits = 8
    return {name: b"" if kind == no_bits else code[offset : offset + size] for name, kind, offset, size in _named(code)}


def _sizes(code: bytes) -> Dict[str, int]:
    return {name: size for name, _, _, size in _named(code)}


def _symbol_names(sections: Dict[str, bytes]) -> Dict[str, int]:
    table, strings = sections[".symtab"], sections[".strtab"]
    names = {}
    for index, at in enumerate(range(0, len(table), 24)):
        (start,) = struct.unpack_from("<I", table, at)
        names[strings[start : strings.index(b"\0", start)].decode()] = index
    return names


def _attributes(info: bytes) -> Tuple[Dict[int, int], Dict[int, int]]:
    """Return stack sizes and register counts by symbol index."""
    stacks: Dict[int, int] = {}
    registers: Dict[int, int] = {}
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _FORMAT_SIZED:
            if attribute in (_MIN_STACK_SIZE, _REGISTER_COUNT):
                symbol, value = struct.unpack_from("<II", info, at)
                (stacks if attribute == _MIN_STACK_SIZE else registers)[symbol] = value
            at += size
    return stacks, registers
