"""Build an aarch64 wheel on any machine, in the CPython version that it is for: `python cross_build.py OUT [PACKAGE [OPTION...]]`.

The package is bnb-cpu-neon, or the folder of another that scikit-build-core builds; options are those of `python -m build`. Without
`--no-isolation`, programs that the build requires would be those for aarch64.

That Python needs the packages `build`, `auditwheel`, which brings pyelftools, and `ziglang`, and there must be a `patchelf`.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

TOOLS = Path(__file__).parent
#: A shared library's suffix, by which the build knows what it is built for.
SUFFIX = ".cpython-{}{}-aarch64-linux-gnu.so".format(*sys.version_info)
#: The newest glibc 2.x that a wheel may need: that of manylinux2014, which every Jetson has.
NEWEST_GLIBC = 17
#: The libraries of glibc itself.
LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "ld-linux-aarch64.so.1"}


def build(out: Path, package: Path = TOOLS.parent, *options: str) -> Path:
    """Build the wheel for this Python version into `out`, tag it by the glibc that it needs, and return its path.

    Raises:
        SystemExit: it needs what not every Jetson has; see `check`.
    """
    environment = {
        **os.environ,
        "CMAKE_TOOLCHAIN_FILE": str(TOOLS / "aarch64-zig.cmake"),
        "BNB_ZIG_PYTHON": sys.executable,
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "SETUPTOOLS_EXT_SUFFIX": SUFFIX,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--wheel", *options, "--outdir", folder, str(package)]
        subprocess.run(command, env=environment, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", f"{folder}/repaired"]
        subprocess.run([*repair, str(wheel)], check=True)
        (repaired,) = Path(folder).glob("repaired/*.whl")
        check(repaired)
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(str(repaired), str(out)))


def check(wheel: Path) -> None:
    """Look at what a wheel that was tagged by `auditwheel` needs.

    Raises:
        SystemExit: a newer glibc than the oldest Jetson has, or another library than those of glibc.
    """
    (glibc,) = re.findall(r"manylinux_2_(\d+)_", wheel.name)
    if int(glibc) > NEWEST_GLIBC:
        raise SystemExit(f"{wheel.name} needs glibc 2.{glibc}; it must run with 2.{NEWEST_GLIBC}")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                dynamic = ELFFile(io.BytesIO(archive.read(name))).get_section_by_name(".dynamic")
                foreign = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")} - LIBRARIES
                if foreign:
                    raise SystemExit(f"{name} in {wheel.name} needs {', '.join(sorted(foreign))}; link that statically")


if __name__ == "__main__":
    print(build(*map(Path, sys.argv[1:3]), *sys.argv[3:]))
