"""Build an aarch64 wheel on any machine, in the CPython version that it is for: `python cross_build.py OUT [PACKAGE [OPTION...]]`.

The package is bnb-cpu-neon, or the folder of another that scikit-build-core builds; options are those of `python -m build`. Without
`--no-isolation`, programs that the build requires would be those for aarch64.

That Python needs the packages `build`, `auditwheel` and `ziglang`, and there must be a `patchelf`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).parent
#: A shared library's suffix, by which the build knows what it is built for.
SUFFIX = ".cpython-{}{}-aarch64-linux-gnu.so".format(*sys.version_info)
#: The newest glibc 2.x that a wheel may need: that of manylinux2014, which every Jetson has.
NEWEST_GLIBC = 17


def build(out: Path, package: Path = TOOLS.parent, *options: str) -> Path:
    """Build the wheel for this Python version into `out`, tag it by the glibc that it needs, and return its path.

    Raises:
        SystemExit: it needs a newer glibc than the oldest Jetson has.
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
        out.mkdir(parents=True, exist_ok=True)
        before = set(out.glob("*.whl"))
        repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", str(out)]
        subprocess.run([*repair, str(wheel)], check=True)
        (repaired,) = set(out.glob("*.whl")) - before
    (glibc,) = re.findall(r"manylinux_2_(\d+)_", repaired.name)
    if int(glibc) > NEWEST_GLIBC:
        raise SystemExit(f"{repaired.name} needs glibc 2.{glibc}; it must run with 2.{NEWEST_GLIBC}")
    return repaired


if __name__ == "__main__":
    print(build(*map(Path, sys.argv[1:3]), *sys.argv[3:]))
