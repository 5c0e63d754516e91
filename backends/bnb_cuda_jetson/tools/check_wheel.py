"""Check what a built wheel holds: `python check_wheel.py WHEEL 72 87 110` fails unless it has code for just these architectures.

It must also be small, for boards whose disk is. What it links to is checked where it is built.
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
#: Of ELF headers: the number of NVIDIA's machines.
_CUDA = 190


def embedded_architectures(library: bytes) -> Set[int]:
    """Return the architectures whose cubins lie in a library."""
    starts = (match.start() for match in re.finditer(b"\x7fELF\x02\x01", library))
    cubins = [library[at : at + 64] for at in starts if struct.unpack_from("<H", library, at + 18)[0] == _CUDA]
    return {cubin.architecture(code) for code in cubins}


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
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]), set(map(int, sys.argv[2:])))
    if wrong:
        raise SystemExit(f"{sys.argv[1]}: {'; '.join(wrong)}")
