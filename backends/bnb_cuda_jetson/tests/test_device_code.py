"""The compiler of device code: what it refuses, and what it says of the code."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

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
    source, output = tmp_path / "unit.cu", tmp_path / "unit.cubin"
    source.write_text(text)
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


@pytest.mark.parametrize("architecture", [72, 87])
def test_code_for_jetpack_5_has_the_format_of_cuda_11(tmp_path, architecture):
    """Its driver is of CUDA 11.4. The version of cubins' ELF ABI has been 7 in all of CUDA 11, and 8 from CUDA 13 on."""
    assert compile_code(tmp_path, SUM, architecture).returncode == 0
    header = cubin.header((tmp_path / "unit.cubin").read_bytes())
    assert (header.os_abi, header.abi_version) == (0x33, 7)
    assert header.flags & 0xFF == architecture
