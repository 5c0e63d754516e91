"""A machine with a made-up NVIDIA driver, for tests of the host code where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, List, NamedTuple

import pytest


class Run(NamedTuple):
    """What a program printed, and what it asked of the driver."""

    output: str
    calls: List[str]

    def calls_of(self, name: str) -> List[str]:
        return [call[len(name) + 1 :] for call in self.calls if call.split(" ")[0] == name]


@pytest.fixture(scope="session")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, to make the driver")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_driver.cpp")
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return folder


@pytest.fixture
def run_with_driver(driver_folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """Run Python code in a process of its own, on a machine with devices of these compute capabilities."""

    def run(code: str, capabilities: str, **settings: Any) -> Run:
        log = tmp_path / "log"
        log.write_text("")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(driver_folder),
            "FAKE_CAPABILITIES": capabilities,
            "FAKE_LOG": str(log),
            "BNB_TUNE_CACHE": str(tmp_path / "tables"),
            **{f"FAKE_{name.upper()}": str(value) for name, value in settings.items()},
        }
        program = "from bnb_cuda_jetson import _native, backend\n" + code
        result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return Run(result.stdout, log.read_text().splitlines())

    return run
