"""Build a wheel for an old Linux on any machine, in the CPython version that it is for: `python cross_build.py OUT [OPTION...]`.

Options that are not listed by `--help` go to `python -m build`. Without `--no-isolation`, programs that the build requires would be
those for the other machine.

That Python needs the packages `build`, `pyelftools` and `ziglang`, and there must be an `auditwheel` that knows other machines than
its own, from 6.2 on, and a `patchelf`.
"""

from __future__ import annotations

import argparse
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

TOOLS = Path(__file__).resolve().parent
#: A shared library's suffix, by which the build knows what it is built for.
SUFFIX = ".cpython-{}{}-{{}}-linux-gnu.so".format(*sys.version_info)
#: The newest glibc 2.x that a wheel may need: that of manylinux2014, which every Jetson has.
NEWEST_GLIBC = 17
#: The libraries of glibc itself.
LIBRARIES = {
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2",
}


def build(out: Path, package: Path, machine: str, *options: str) -> Path:
    """Build the wheel for this Python version into `out`, tag it by the glibc that it needs, and return its path.

    Raises:
        SystemExit: it needs what not every Jetson has; see `check`.
    """
    environment = {
        **os.environ,
        "CMAKE_TOOLCHAIN_FILE": str(TOOLS / "zig.cmake"),
        "BNB_ZIG_PYTHON": sys.executable,
        "BNB_ZIG_MACHINE": machine,
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SETUPTOOLS_EXT_SUFFIX": SUFFIX.format(machine),
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--wheel", *options, "--outdir", folder, str(package)]
        subprocess.run(command, env=environment, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        repaired_in = Path(folder) / "repaired"
        repair = ["auditwheel", "repair", "--plat", "auto", "--wheel-dir", str(repaired_in)]
        subprocess.run([*repair, str(wheel)], check=True)
        (repaired,) = repaired_in.glob("*.whl")
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


def main() -> None:
    """Build as the command line says, and print where the wheel is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the wheel")
    parser.add_argument("--package", type=Path, default=TOOLS.parent, help="folder of a package that scikit-build-core builds")
    parser.add_argument("--machine", choices=["aarch64", "x86_64"], default="aarch64", help="processor")
    arguments, options = parser.parse_known_args()
    print(build(arguments.out, arguments.package, arguments.machine, *options))


if __name__ == "__main__":
    main()
