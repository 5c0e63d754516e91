"""An aarch64 Python with torch that runs on any Linux machine, under QEMU's user-mode emulation: no root, no chroot, no container.

Needs Debian's `apt-get`, `dpkg` and `qemu-user-static` (and `qemu-user` for plugins), and a network; for Python 3.8 and 3.10 also
this machine's own of that version.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Callable, Dict, List, NamedTuple, Optional

#: OpenBLAS does not know every CPU of the emulator, and would take instructions for granted that some lack.
ENVIRONMENT = {"OPENBLAS_CORETYPE": "NEOVERSEN1", "OMP_NUM_THREADS": "1"}

#: The statically linked one cannot load plugins. The other, of version 7, ends where a forked process makes a thread.
EMULATOR, EMULATOR_WITH_PLUGINS = "qemu-aarch64-static", "qemu-aarch64"
#: By QEMU's name of a CPU without its options: implementer and part, as Linux shows them in /proc/cpuinfo; before version 8 the
#: emulator shows the machine's own file.
PARTS = {"cortex-a72": (0x41, 0xD08), "a64fx": (0x46, 0x001), "cortex-a76": (0x41, 0xD0B), "max": (0x00, 0x051)}

#: torch and what a test run needs besides the packages of this repository. Spelled out, because pip evaluates the dependencies of
#: another platform for its own, where torch asks for gigabytes of CUDA. Later versions of hypothesis read the sources of all
#: modules, which takes seconds in emulation.
PACKAGES = (
    "torch", "filelock", "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "mpmath", "markupsafe", "numpy",
    "pluggy", "click", "rich", "markdown-it-py", "mdurl", "pygments", "safetensors", "tokenizers",
    "pytest", "iniconfig", "packaging", "hypothesis==6.113.0", "sortedcontainers", "attrs",
)  # fmt: skip
#: For an older Python, the last versions of packages that have newer ones, and what it needs besides. pip would look this up
#: itself, but not every index tells it which Python a version is for.
FOR_PYTHON_310 = {"numpy": "2.2.6", "networkx": "3.4.2", "exceptiongroup": "1.3.1", "tomli": "2.4.0"}
FOR_PYTHON_39 = {
    **FOR_PYTHON_310,
    "numpy": "2.0.2", "click": "8.1.8", "filelock": "3.19.1", "fsspec": "2025.10.0", "iniconfig": "2.1.0",
    "markdown-it-py": "3.0.0", "networkx": "3.2.1", "pytest": "8.4.2", "importlib_metadata": "8.7.0", "zipp": "3.23.0",
    "attrs": "25.4.0",
}  # fmt: skip
FOR_PYTHON_38 = {
    **FOR_PYTHON_39,
    "numpy": "1.24.4", "filelock": "3.16.1", "fsspec": "2025.3.0", "networkx": "3.1", "pytest": "8.3.5", "pluggy": "1.5.0",
    "importlib_metadata": "8.5.0", "zipp": "3.20.2", "attrs": "25.3.0", "sympy": "1.13.3", "jinja2": "3.1.6", "markupsafe": "2.1.5",
    "typing_extensions": "4.13.2", "packaging": "25.0", "pygments": "2.19.2", "rich": "14.0.0", "safetensors": "0.5.3",
    "tokenizers": "0.20.3",
}  # fmt: skip


class Release(NamedTuple):
    """A Debian release, and a Python to test on there."""

    suite: str
    python: str
    versions: Dict[str, str]
    """Of packages that are not to be the newest."""
    cx_freeze: str = ""
    """Where Debian does not have that Python: a version of cx_Freeze whose launcher is one, all but the standard library."""


RELEASES = {
    # The newest torch whose aarch64 wheel comes without CUDA.
    "3.13": Release("trixie", "3.13", {"torch": "2.10.0"}),
    "3.11": Release("bookworm", "3.11", {"torch": "2.10.0"}),
    "3.10": Release("bookworm", "3.10", {"torch": "2.10.0", **FOR_PYTHON_310}, "6.15.16"),
    # glibc 2.31, as on JetPack 5; the last torch that runs on ARMv8.0.
    "3.9": Release("bullseye", "3.9", {"torch": "2.5.1", **FOR_PYTHON_39}),
    # The last torch for that Python.
    "3.8": Release("bullseye", "3.8", {"torch": "2.4.1", **FOR_PYTHON_38}, "6.15.5"),
}


def newest_wheels(dist: Path, python: str = "3.13") -> List[str]:
    """List the wheels of this repository's packages in a folder that an emulated Python of this version runs."""
    tag = "-cp312-abi3-" if python == "3.13" else "-cp{0}-cp{0}-".format(python.replace(".", ""))
    found = {}
    for wheel in sorted(dist.glob("bnb_*.whl"), key=lambda path: path.stat().st_mtime):
        if wheel.name.endswith("-none-any.whl") or (tag in wheel.name and "aarch64" in wheel.name):
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
        for program in ("apt-get", "dpkg", EMULATOR):
            if shutil.which(program) is None:
                raise FileNotFoundError(f"{program} is not installed; on Debian, install apt, dpkg and qemu-user-static")
        self.release = RELEASES[python]
        self._folder = folder.resolve() / f"python{python}"
        self.root = self._folder / "root"
        self.site = self._folder / "site"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._once("root", self._make_root)
        self._python = self._make_python()
        self._once("packages", self._install_packages)

    def install(self, *packages: str) -> None:
        """Install wheels or packages, without their dependencies, in place of what is there of them."""
        self._install_into(self.site, *packages)

    def _install_into(self, folder: Path, *packages: str) -> None:
        tag = "cp" + self.release.python.replace(".", "")
        systems = ("manylinux_2_28", "manylinux_2_24", "manylinux2014", "manylinux_2_17")
        platforms = [f"--platform={system}_aarch64" for system in systems]
        abis = [f"--abi={abi}" for abi in (tag, "abi3", "none")]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--only-binary=:all:"]
        target = [f"--target={folder}", "--implementation=cp", f"--python-version={self.release.python}"]
        subprocess.run([*command, *platforms, *abis, *target, *packages], check=True)

    def run(
        self,
        *arguments: str,
        cpu: str = "cortex-a76",
        plugin: Optional[str] = None,
        environment: Optional[Dict[str, str]] = None,
        folder: Optional[Path] = None,
        output: Optional[IO[str]] = None,
    ) -> None:
        """Run the Python with these arguments.

        Args:
            arguments: what would follow `python` on a command line.
            cpu: QEMU's name of the CPU.
            plugin: a TCG plugin of QEMU, with its arguments.
            environment: variables to set.
            folder: working directory.
            output: file for what it prints; by default that is printed.

        Raises:
            CalledProcessError: it failed.
        """
        emulator = {"QEMU_CPU": cpu, "QEMU_LD_PREFIX": str(self._prefix(cpu)), "BNB_EMULATOR": EMULATOR}
        if self.release.python == "3.8":
            emulator["QEMU_PAGESIZE"] = "65536"  # that launcher's segments are laid out for it
        if plugin:
            emulator.update(QEMU_PLUGIN=plugin, QEMU_LOG="plugin", BNB_EMULATOR=EMULATOR_WITH_PLUGINS)
        guest = {"PYTHONHOME": str(self.root / "usr"), "PYTHONPATH": str(self.site), **ENVIRONMENT, **(environment or {})}
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_", "QEMU_"))}
        subprocess.run(
            [str(self._python), *arguments],
            check=True,
            env={**outside, **emulator, **guest},
            cwd=folder,
            stdout=output,
            stderr=output and subprocess.STDOUT,
        )

    def _once(self, name: str, make: Callable[[], None]) -> None:
        done = self._folder / f"{name}.done"
        if not done.exists():
            make()
            done.touch()

    def _make_python(self) -> Path:
        """Write a script that runs the Python; to that it is `sys.executable`, so that tests can start others like it."""
        script = self._folder / "python"
        python = self.root / f"usr/bin/python{self.release.python}"
        script.write_text(f'#!/bin/sh\nexec "$BNB_EMULATOR" -0 "$0" {shlex.quote(str(python))} "$@"\n')
        script.chmod(0o755)
        return script

    def _prefix(self, cpu: str) -> Path:
        """Return the folder where the emulated system looks for files first: the root, and what Linux says of the CPU."""
        prefix = self._folder / cpu
        (prefix / "proc").mkdir(parents=True, exist_ok=True)
        implementer, part = PARTS[cpu.partition(",")[0]]
        (prefix / "proc/cpuinfo").write_text(f"processor\t: 0\nCPU implementer\t: {implementer:#04x}\nCPU part\t: {part:#05x}\n")
        for name in ("lib", "usr"):
            if not (prefix / name).exists():
                (prefix / name).symlink_to(self.root / name)
        return prefix

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
        python = "libc6" if self.release.cx_freeze else f"python{self.release.python}"
        packages = [python, "zlib1g", "libgomp1", "libstdc++6", "libcrypt1"]
        subprocess.run([*command, "--yes", "--download-only", "--no-install-recommends", "install", *packages], check=True)
        self.root.mkdir(exist_ok=True)
        for archive in sorted((apt / "archives").glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(archive), str(self.root)], check=True)
        if not (self.root / "lib").exists():  # a merged /usr, whose links no package holds
            (self.root / "lib").symlink_to("usr/lib")
        if self.release.cx_freeze:
            self._make_frozen_python()

    def _make_frozen_python(self) -> None:
        """Make a Python of cx_Freeze's launcher, and the standard library of this machine's Python of that version."""
        freezer, version = self._folder / "cx_Freeze", self.release.python
        self._install_into(freezer, f"cx_Freeze=={self.release.cx_freeze}")
        bases = freezer / "cx_Freeze/bases"
        (launcher,) = bases.glob("console-*")
        libraries = self.root / "usr/bin/lib"
        library = self._folder / "lib"  # found beside the script that stands for the Python
        for remnant in (libraries, library):
            shutil.rmtree(remnant, ignore_errors=True)
        shutil.copytree(bases / "lib", libraries)
        shutil.copy(launcher, self.root / f"usr/bin/python{version}")
        where = [f"python{version}", "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"]
        of_this_machine = subprocess.run(where, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
        unwanted = shutil.ignore_patterns("__pycache__", "site-packages", "lib-dynload", "test", "config-*")
        shutil.copytree(of_this_machine, library, ignore=unwanted)
        shutil.copytree(bases / "lib-dynload", library / "lib-dynload")
        (settings,) = library.glob("_sysconfigdata_*.py")
        settings.rename(library / "_sysconfigdata__linux_aarch64-linux-gnu.py")
        shutil.copy(Path(__file__).with_name("frozen_startup.py"), library / "__startup__.py")

    def _install_packages(self) -> None:
        versions = self.release.versions
        names = dict.fromkeys((*PACKAGES, *versions))
        self.install(*(f"{name}=={versions[name]}" if name in versions else name for name in names))
