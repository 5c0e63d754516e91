"""The tools: the compiler of device code, what it refuses and says of the code, and the check of wheels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bnb_cuda_jetson import _native

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import check_wheel  # noqa: E402
import cubin  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="needs NVRTC, as pyproject.toml names it")

SUM = """
extern "C" __global__ void total(float* out, const float* x) {
  __shared__ float partial[32];
  partial[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) out[0] = partial[0] + partial[31];
}
"""
#: An array that is indexed by a value of run time cannot be in registers.
SPILLING = """
extern "C" __global__ void histogram(int* out, const int* x, int n) {
  int counts[64] = {};
  for (int i = 0; i < n; ++i) ++counts[x[i] & 63];
  for (int i = 0; i < 64; ++i) out[i] = counts[i];
}
"""


def compile_code(tmp_path: Path, text: str, architecture: int) -> "subprocess.CompletedProcess[str]":
    source = tmp_path / "unit.cu"
    source.write_text(text)
    return run_compiler(source, tmp_path / "unit.cubin", architecture)


def run_compiler(source: Path, output: Path, architecture: int) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOLS / "compile_device_code.py"), str(source), "--architecture", str(architecture)]
    return subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)


@pytest.mark.parametrize("architecture", [72, 87, 110])
def test_the_needs_of_a_kernel_are_read_off_its_code(tmp_path, architecture):
    assert compile_code(tmp_path, SUM, architecture).returncode == 0
    (kernel,) = cubin.kernels((tmp_path / "unit.cubin").read_bytes())
    assert kernel.name == "total"
    assert 0 < kernel.registers < 64
    assert kernel.stack == 0
    assert kernel.shared >= 128


@pytest.mark.parametrize("architecture", [72, 87, 110])
def test_a_kernel_that_uses_local_memory_is_refused(tmp_path, architecture):
    result = compile_code(tmp_path, SPILLING, architecture)
    assert result.returncode != 0
    assert f"unit.cu for sm_{architecture} uses local memory: histogram (256 bytes" in result.stderr
    assert not (tmp_path / "unit.cubin").exists()


def test_an_error_of_the_source_is_shown(tmp_path):
    result = compile_code(tmp_path, 'extern "C" __global__ void broken() { return 1 }', 87)
    assert result.returncode != 0
    assert "unit.cu for sm_87:" in result.stderr
    assert "error" in result.stderr


#: ELF headers of cubins in NVIDIA's own libraries. The driver of JetPack 5 is of CUDA 11.4, between these versions.
OF_NVIDIA = {
    "cuBLAS, 10.2, sm_70": cubin.Header(0x33, 7, 102, 0x460546),
    "cuRAND, 11.7, sm_70": cubin.Header(0x33, 7, 117, 0x460546),
    "cuRAND, 11.7, sm_86": cubin.Header(0x33, 7, 117, 0x560556),
}


@pytest.mark.parametrize("of_nvidia", OF_NVIDIA.values(), ids=OF_NVIDIA)
@pytest.mark.parametrize("architecture", [72, 87])
def test_code_for_jetpack_5_has_the_format_of_its_time(tmp_path, architecture, of_nvidia):
    assert compile_code(tmp_path, SUM, architecture).returncode == 0
    header = cubin.header((tmp_path / "unit.cubin").read_bytes())
    assert (header.os_abi, header.abi_version) == (of_nvidia.os_abi, of_nvidia.abi_version)
    of_another = of_nvidia.flags & 0xFF
    assert header.flags == of_nvidia.flags - (of_another << 16 | of_another) + (architecture << 16 | architecture)
    assert header.toolkit // 10 == 11  # a driver of one minor version takes code of another


def test_code_for_thor_says_so_in_the_format_of_cuda_13(tmp_path):
    assert compile_code(tmp_path, SUM, 110).returncode == 0
    code = (tmp_path / "unit.cubin").read_bytes()
    assert (cubin.header(code).os_abi, cubin.header(code).abi_version, cubin.architecture(code)) == (0x41, 8, 110)


@pytest.fixture
def compiled(tmp_path):
    """The output of a compiler that has run once."""
    assert compile_code(tmp_path, SUM, 87).returncode == 0
    return tmp_path / "unit.cubin"


def test_code_that_is_newer_than_its_source_is_not_compiled_again(tmp_path, compiled):
    source = tmp_path / "unit.cu"
    made = compiled.stat().st_mtime_ns
    assert run_compiler(source, compiled, 87).returncode == 0
    assert compiled.stat().st_mtime_ns == made
    source.touch()
    assert run_compiler(source, compiled, 87).returncode == 0
    assert compiled.stat().st_mtime_ns > made


def test_a_changed_header_has_code_compiled_again(tmp_path, compiled):
    made = compiled.stat().st_mtime_ns
    (tmp_path / "new.cuh").write_text("")
    assert run_compiler(tmp_path / "unit.cu", compiled, 87).returncode == 0
    assert compiled.stat().st_mtime_ns > made


# --------------------------------------------------------------------------------------------------------------------- wheels


@pytest.fixture
def wheel(tmp_path):
    """What stands in for a wheel: an archive with this package's native library, and the architectures in it."""
    path = tmp_path / "stand_in.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(_native.__file__, "bnb_cuda_jetson/_native.so")
    return path, set(_native.architectures())


def test_the_architectures_in_a_wheel_are_found(wheel):
    path, architectures = wheel
    assert not [fault for fault in check_wheel.faults(path, architectures) if "code for" in fault]
    (fault,) = [fault for fault in check_wheel.faults(path, architectures | {75}) if "code for" in fault]
    assert fault == f"it has code for {sorted(architectures)}, not for {sorted(architectures | {75})}"


def test_a_wheel_that_is_too_large_is_found(wheel, monkeypatch):
    path, architectures = wheel
    monkeypatch.setattr(check_wheel, "MOST_BYTES", 1000)
    assert check_wheel.faults(path, architectures)[0] == f"it has {path.stat().st_size} bytes; at most 1000 are wanted"
