"""Compile one source of device code for one architecture, with NVRTC from PyPI, and check what the kernels need.

python compile_device_code.py native/device/four_bit.cu --architecture 87 --output four_bit.sm_87.cubin
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import List, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import cubin


class Compiler(NamedTuple):
    """A release of NVRTC: where its library and headers lie in the packages under `nvidia`."""

    library: str
    headers: List[str]


CUDA_11_8 = Compiler("cuda_nvrtc/lib/libnvrtc.so.11.2", ["cuda_runtime/include", "cuda_nvcc/include"])
CUDA_13 = Compiler("cu13/lib/libnvrtc.so.13", ["cu13/include"])

#: The oldest compiler that knows an architecture makes its code, so that the oldest driver takes it.
OLDEST_FOR_13 = 100

OPTIONS = [
    "--std=c++17",
    "--fmad=false",  # results are defined to the bit; a kernel that wants a fused multiply-add says fmaf
    "--restrict",
]


def compiler_for(architecture: int) -> Compiler:
    """Choose the compiler of an architecture."""
    return CUDA_13 if architecture >= OLDEST_FOR_13 else CUDA_11_8


def packages() -> List[Path]:
    """Return the folders that hold NVIDIA's packages.

    Raises:
        SystemExit: none is installed.
    """
    spec = importlib.util.find_spec("nvidia")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(
            "no NVRTC is installed; pip install nvidia-cuda-nvrtc-cu11 nvidia-cuda-nvrtc, as pyproject.toml names them"
        )
    return [Path(location) for location in spec.submodule_search_locations]


def compile_source(source: Path, architecture: int, compiler: Compiler) -> bytes:
    """Compile to a cubin.

    Raises:
        SystemExit: the compiler refuses the source; its log is the message.
    """
    found = [folder / compiler.library for folder in packages() if (folder / compiler.library).exists()]
    if not found:
        raise SystemExit(f"{compiler.library} is in none of NVIDIA's packages; install those that pyproject.toml names")
    headers = [str(folder / header) for folder in packages() for header in compiler.headers if (folder / header).exists()]
    for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC looks for it by name, and finds it where it is loaded already
    nvrtc = ctypes.CDLL(str(found[0]))
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), str(source).encode(), 0, None, None))
    options = [
        *OPTIONS,
        f"--gpu-architecture=sm_{architecture}",
        f"-I{source.parent}",
        f"-I{source.parent.parent / 'shared'}",
        *(f"-I{header}" for header in headers),
    ]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode()
    if result:
        raise SystemExit(f"{source.name} for sm_{architecture}:\n{log}")
    if log.strip():
        print(log, file=sys.stderr)
    return _read(nvrtc, program, "CUBIN")


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, content))
    return content.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise SystemExit(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(result).decode()}")


def is_current(output: Path, source: Path) -> bool:
    """Say whether the output is newer than all that it is made from: the source, the headers beside it, and the compiler."""
    headers = [*source.parent.glob("*.cuh"), *source.parent.parent.glob("shared/*.h")]
    made_from = [source, *headers, Path(__file__), Path(cubin.__file__)]
    return output.exists() and output.stat().st_mtime > max(path.stat().st_mtime for path in made_from)


def main() -> None:
    """Compile, check and write, unless that has been done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--architecture", type=int, required=True, help="compute capability without the dot, such as 87")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if is_current(arguments.output, arguments.source):
        return
    code = compile_source(arguments.source, arguments.architecture, compiler_for(arguments.architecture))
    spills = [kernel for kernel in cubin.kernels(code) if kernel.stack]
    if spills:
        names = ", ".join(f"{kernel.name} ({kernel.stack} bytes, {kernel.registers} registers)" for kernel in spills)
        raise SystemExit(f"{arguments.source.name} for sm_{arguments.architecture} uses local memory: {names}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(code)


if __name__ == "__main__":
    main()
