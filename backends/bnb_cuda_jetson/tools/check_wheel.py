"""Check what a built wheel holds: `python check_wheel.py WHEEL 72 87 110` fails unless it has code for just these architectures.

It must be small enough for a package index's mind and a Jetson's disk, and link to nothing but the C library, so that one wheel
serves every version of CUDA, of torch and of the compiler's libraries.
"""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from pathlib import Path
from typing import List, Set

sys.path.insert(0, str(Path(__file__).parent))
import cubin

MOST_BYTES = 12 << 20
#: Libraries that may be linked: glibc's, which every Linux of its age has.
C_LIBRARY = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-aarch64.so.1", "ld-linux-x86-64.so.2"}
#: Of ELF headers: the number of NVIDIA's machines, and of the entries of `.dynamic` that name a library.
_CUDA, _NEEDED = 190, 1


def embedded_architectures(library: bytes) -> Set[int]:
    """Return the architectures whose cubins lie in a library."""
    starts = (match.start() for match in re.finditer(b"\x7fELF\x02\x01", library))
    cubins = [library[at : at + 64] for at in starts if struct.unpack_from("<H", library, at + 18)[0] == _CUDA]
    return {cubin.architecture(code) for code in cubins}


def linked_libraries(library: bytes) -> List[str]:
    """Return the names of the shared libraries that a library asks the loader for."""
    sections = cubin.sections(library)
    strings, dynamic = sections[".dynstr"], sections[".dynamic"]
    names = []
    for at in range(0, len(dynamic), 16):
        tag, value = struct.unpack_from("<QQ", dynamic, at)
        if tag == _NEEDED:
            names.append(strings[value : strings.index(b"\0", value)].decode())
    return names


def faults(wheel: Path, architectures: Set[int]) -> List[str]:
    """Say what is wrong with a wheel."""
    found = []
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"it has {wheel.stat().st_size} bytes; at most {MOST_BYTES} are wanted")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        library = archive.read(name)
    if embedded_architectures(library) != architectures:
        found.append(f"it has code for {sorted(embedded_architectures(library))}, not for {sorted(architectures)}")
    if not C_LIBRARY.issuperset(linked_libraries(library)):
        found.append(f"it links to {', '.join(sorted(set(linked_libraries(library)) - C_LIBRARY))}")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]), set(map(int, sys.argv[2:])))
    if wrong:
        raise SystemExit(f"{sys.argv[1]}: {'; '.join(wrong)}")
