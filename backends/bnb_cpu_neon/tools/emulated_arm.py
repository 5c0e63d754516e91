"""An aarch64 Python with torch that runs on any Linux machine, under QEMU's user-mode emulation: no root, no chroot, no container.

Needs Debian's `apt-get`, `dpkg` and `qemu-user`, and a network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

#: By tier: a CPU that has its features and not those of the next, and what torch needs to run there.
CPUS: Dict[str, str] = {"baseline": "a64fx,sve=off", "dotprod": "cortex-a76", "i8mm": "max,pauth-impdef=on"}
#: OpenBLAS does not know the first, and would take instructions for granted that it lacks.
ENVIRONMENT = {"OPENBLAS_CORETYPE": "NEOVERSEN1", "OMP_NUM_THREADS": "1"}

#: What a test run needs besides the packages of this repository. Spelled out, because pip evaluates the dependencies of another
#: platform for its own, where torch asks for gigabytes of CUDA.
TORCH = ("torch", "filelock", "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "mpmath", "markupsafe", "numpy")
TOOLS = ("pluggy", "click", "rich", "markdown-it-py", "mdurl", "pygments", "pytest", "iniconfig", "packaging", "hypothesis",
         "sortedcontainers", "safetensors")  # fmt: skip
BACKPORTS = ("importlib_metadata", "zipp", "attrs", "exceptiongroup", "tomli")


class Release(NamedTuple):
    """A Debian release with a Python to test on."""

    suite: str
    python: str
    torch: str


RELEASES = {
    "3.13": Release("trixie", "3.13", "2.10.0"),  # the newest torch whose aarch64 wheel comes without CUDA
    "3.9": Release("bullseye", "3.9", "2.5.1"),  # glibc 2.31, as on JetPack 5
}


def newest_wheels(dist: Path) -> List[str]:
    """List the wheels of this repository's packages in a folder that run on an emulated Python from 3.12 on."""
    found = {}
    for wheel in sorted(dist.glob("bnb_*.whl"), key=lambda path: path.stat().st_mtime):
        if wheel.name.endswith("-none-any.whl") or ("-cp312-abi3-" in wheel.name and "aarch64" in wheel.name):
            found[wheel.name.split("-")[0]] = str(wheel)
    return [found[name] for name in ("bnb_core", "bnb_reference", "bnb_cpu_neon")]


class EmulatedArm:
    """An aarch64 Python in a folder, made when first used and kept there.

    Args:
        folder: where to put it; about 600 MB.
        python: key of `RELEASES`.

    Raises:
        FileNotFoundError: a program that is needed is not installed.
    """

    def __init__(self, folder: Path, python: str = "3.13") -> None:
        for program in ("apt-get", "dpkg", "qemu-aarch64"):
            if shutil.which(program) is None:
                raise FileNotFoundError(f"{program} is not installed; on Debian, install apt, dpkg and qemu-user")
        self.release = RELEASES[python]
        self._folder = folder.resolve() / f"python{python}"
        self.root = self._folder / "root"
        self.site = self._folder / "site"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._once("root", self._make_root)
        self._once("torch", self._install_torch)

    def install(self, *packages: str) -> None:
        """Install wheels or packages, without their dependencies, in place of what is there of them."""
        tag = "cp" + self.release.python.replace(".", "")
        systems = ("manylinux_2_28", "manylinux_2_24", "manylinux2014", "manylinux_2_17")
        platforms = [f"--platform={system}_aarch64" for system in systems]
        abis = [f"--abi={abi}" for abi in (tag, "abi3", "none")]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--only-binary=:all:"]
        target = [f"--target={self.site}", "--implementation=cp", f"--python-version={self.release.python}"]
        subprocess.run([*command, *platforms, *abis, *target, *packages], check=True)

    def run(
        self,
        *arguments: str,
        cpu: str = CPUS["dotprod"],
        plugin: Optional[str] = None,
        environment: Optional[Dict[str, str]] = None,
        folder: Optional[Path] = None,
        extra_site: Sequence[Path] = (),
    ) -> None:
        """Run the Python with these arguments.

        Args:
            arguments: what would follow `python` on a command line.
            cpu: QEMU's name of the CPU.
            plugin: a TCG plugin of QEMU, with its arguments.
            environment: variables to set.
            folder: working directory.
            extra_site: folders whose packages come before the others.

        Raises:
            CalledProcessError: it failed.
        """
        path = ":".join(map(str, (*extra_site, self.site)))
        guest = {**ENVIRONMENT, "PYTHONHOME": str(self.root / "usr"), "PYTHONPATH": path, **(environment or {})}
        command = ["qemu-aarch64", "-cpu", cpu, "-L", str(self.root)]
        command += ["-plugin", plugin, "-d", "plugin"] if plugin else []
        for name, value in guest.items():
            command += ["-E", f"{name}={value}"]
        command += [str(self.root / f"usr/bin/python{self.release.python}"), *arguments]
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
        subprocess.run(command, check=True, env=outside, cwd=folder)

    def _once(self, name: str, make: Callable[[], None]) -> None:
        done = self._folder / f"{name}.done"
        if not done.exists():
            make()
            done.touch()

    def _make_root(self) -> None:
        """Unpack Debian's aarch64 Python and the libraries that it and torch need."""
        apt = self._folder / "apt"
        for part in ("lists/partial", "archives/partial", "etc"):
            (apt / part).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        # From where this machine's own packages come.
        targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Component: main"]
        mirror = subprocess.run(targets, stdout=subprocess.PIPE, check=True, text=True).stdout.split()[0]
        (apt / "etc/sources.list").write_text(f"deb {mirror} {self.release.suite} main\n")
        options = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "Dir::State::lists": str(apt / "lists"),
            "Dir::State::status": str(apt / "status"),
            "Dir::Cache": str(apt),
            "Dir::Cache::archives": str(apt / "archives"),
            "Dir::Etc::sourcelist": str(apt / "etc/sources.list"),
            "Dir::Etc::sourceparts": "-",
            "Debug::NoLocking": "true",
            "APT::Sandbox::User": "",
        }
        command = ["apt-get", "--quiet=2"] + [f"-o{name}={value}" for name, value in options.items()]
        subprocess.run([*command, "update"], check=True)
        packages = [f"python{self.release.python}", "libgomp1", "libstdc++6", "libcrypt1"]
        subprocess.run([*command, "--yes", "--download-only", "--no-install-recommends", "install", *packages], check=True)
        self.root.mkdir(exist_ok=True)
        for archive in sorted((apt / "archives").glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(archive), str(self.root)], check=True)
        if not (self.root / "lib").exists():  # a merged /usr, whose links no package holds
            (self.root / "lib").symlink_to("usr/lib")

    def _install_torch(self) -> None:
        packages: List[str] = [f"torch=={self.release.torch}" if name == "torch" else name for name in TORCH + TOOLS]
        self.install(*packages, *(BACKPORTS if self.release.python == "3.9" else ()))
