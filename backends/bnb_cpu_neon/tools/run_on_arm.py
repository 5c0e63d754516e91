"""Run the tests of the NEON backend on emulated aarch64 CPUs: `python run_on_arm.py DIST FOLDER [pytest arguments]`.

DIST holds the wheels; FOLDER is where the aarch64 Python is put, and kept. Each tier runs on a CPU that has no more than it needs,
so that an instruction which a real core lacks ends the run here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from emulated_arm import CPUS, EmulatedArm, newest_wheels

TESTS = Path(__file__).parent.parent / "tests"
#: What kernels do on other threads and on large tensors is tested without emulation, which is slow.
DEFAULT = ("-k", "plain_call or few_rows or random or each_weight or special or shape")


def main(dist: Path, folder: Path, *arguments: str) -> None:
    """Install the wheels of `dist`, and run the tests in every tier."""
    arm = EmulatedArm(folder)
    arm.install(*newest_wheels(dist))
    for tier, cpu in CPUS.items():
        print(f"{tier}: {cpu}", flush=True)
        test = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "--bnb-strict", str(TESTS))
        arm.run(*test, *(arguments or DEFAULT), cpu=cpu, environment={"BNB_NEON_EXPECTED_TIER": tier})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
