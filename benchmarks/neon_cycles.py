"""Estimate the cycles that the NEON backend's inner loops take on two cores, with llvm-mca.

    python benchmarks/neon_cycles.py [--build FOLDER]

Needs the package `ziglang`, cmake, ninja, and LLVM 16 or newer (Debian's llvm-19). The kernels are compiled as for the wheels, and
each loop is taken out of its object file. llvm-mca knows a core's pipelines and nothing of caches: to it, the nearest one serves
every load. Of the cores in Jetson boards it knows none: Neoverse N1 stands in for Cortex-A78AE (Orin), V2 for V3AE (Thor).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

HERE = Path(__file__).parent
BACKEND = HERE.parent / "backends/bnb_cpu_neon"
#: Each with the tiers that it can run.
CORES = {"neoverse-n1": ("baseline", "dotprod"), "neoverse-v2": ("baseline", "dotprod", "i8mm")}


class Loop(NamedTuple):
    """An inner loop, and how to find it."""

    name: str
    tier: str
    source: str
    """Its file in `native/kernels`."""
    function: str
    """A pattern that its mangled name matches."""
    work: Dict[str, float]
    """What counts as work: patterns of instructions, and the products, or looked-up weights, that each makes."""
    rows: int = 1
    """Rows of x that share a weight there, so that so many products are one weight's."""


FMA = {r"fmla\s+v\d+\.4s": 4.0}
LOOK_UP = {r"tbl\s+v\d+\.16b": 4.0}  # a fourth of the bytes of 16 weights
SDOT = {r"sdot\s+v\d+\.4s": 16.0}
SMMLA = {r"smmla\s+v\d+\.4s": 32.0}
SCALING = {r"fmul\s+v\d+\.4s": 4.0}
WIDENING = {r"sml[as]l2?\s+v\d+\.8h|smull2?\s+v\d+\.8h": 8.0}

LOOPS = (
    Loop("gemm_4bit, 1 row of x", "baseline", "gemm_4bit", r"dot_rowsILi4E", FMA),
    Loop("gemm_4bit, dequantizing a panel", "baseline", "gemm_4bit", r"10dequantizeIfE", LOOK_UP),
    Loop("gemm_4bit, a panel by 16 rows of x", "baseline", "gemm_4bit", r"multiply_tileILi4E", FMA, 16),
    Loop("int8_matmul, 1 row", "baseline", "int8_matmul/baseline", r"multiply_row", WIDENING),
    Loop("int8_matmul, 8 rows", "baseline", "int8_matmul/baseline", r"multiplyI", WIDENING, 8),
    Loop("int8_matmul, 1 row", "dotprod", "int8_matmul/dotprod", r"multiply_row", SDOT),
    Loop("int8_matmul, 8 rows", "dotprod", "int8_matmul/dotprod", r"multiplyEPKa", SDOT, 8),
    Loop("int8_matmul, 8 rows", "i8mm", "int8_matmul/i8mm", r"multiplyEPKa", SMMLA, 8),
    Loop("dequantize_blockwise, mirrored codebook", "baseline", "dequantize_blockwise", r"clIfE.*clEll", SCALING),
)


def program(name: str) -> str:
    """Find a program of LLVM.

    Raises:
        SystemExit: it is not installed.
    """
    for candidate in (*(f"{name}-{version}" for version in range(25, 15, -1)), name):
        if shutil.which(candidate):
            return candidate
    raise SystemExit(f"{name} is not installed; on Debian, install llvm-19")


def compile_kernels(build: Path) -> None:
    """Compile the kernels for aarch64 as they are in wheels."""
    toolchain = BACKEND / "tools/zig.cmake"
    environment = {**os.environ, "BNB_ZIG_PYTHON": sys.executable, "BNB_ZIG_MACHINE": "aarch64"}
    options = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DBNB_NEON_PYTHON=OFF"]
    subprocess.run(["cmake", "-S", str(BACKEND), "-B", str(build), "-G", "Ninja", *options], check=True, env=environment)
    subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)


def work_of(instructions: Sequence[str], work: Dict[str, float]) -> float:
    """Add up what instructions make."""
    return sum(amount for line in instructions for pattern, amount in work.items() if re.match(pattern, line))


def functions(build: Path, loop: Loop) -> List[List[Tuple[int, str]]]:
    """Return the functions that may hold the loop, as instructions with their addresses."""
    (path,) = build.glob(f"**/kernels/{loop.source}.cpp.o")
    command = [program("llvm-objdump"), "--disassemble", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = []
    for part in re.split(r"\n(?=[0-9a-f]+ <)", text)[1:]:
        heading, *lines = part.splitlines()
        if re.search(loop.function, heading):
            parsed = (re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in lines)
            found.append([(int(match[1], 16), match[2]) for match in parsed if match])
    return found


def inner_loop(build: Path, loop: Loop) -> List[str]:
    """Return the instructions of the loop: of those that hold no other, the one that does most.

    Raises:
        SystemExit: there is none.
    """
    bodies = []
    for function in functions(build, loop):
        ends = [(int(match[1], 16), at) for at, line in function if (match := re.search(r"\b0x([0-9a-f]+) <", line))]
        spans = [(begin, end) for begin, end in ends if begin <= end]
        for begin, end in spans:
            if not any((a, b) != (begin, end) and begin <= a and b <= end for a, b in spans):
                bodies.append([line.split(" <")[0].replace("\t", " ") for at, line in function if begin <= at <= end])
    body = max(bodies, key=lambda lines: work_of(lines, loop.work), default=[])
    if not work_of(body, loop.work):
        raise SystemExit(f"{loop.source}.cpp has no loop like that of {loop.name!r}, tier {loop.tier}")
    return body


def cycles(body: Sequence[str], core: str) -> float:
    """Return the cycles of one iteration, in a long run of them."""
    command = [program("llvm-mca"), "-mtriple=aarch64", f"-mcpu={core}", "-json", "-iterations=1000"]
    result = subprocess.run(command, input="\n".join(body), check=True, capture_output=True, text=True)
    (region,) = json.loads(result.stdout)["CodeRegions"]
    summary = region["SummaryView"]
    return float(summary["TotalCycles"] / summary["Iterations"])


def main() -> None:
    """Compile, estimate, print a table, and store the figures in benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--build", type=Path, default=Path("neon-cycles"), help="where the kernels are compiled")
    build = parser.parse_args().build.resolve()
    compile_kernels(build)
    rows = []
    print(f"{'cycles for each weight':40}{'tier':10}{'core':13}{'a row of x':>11}{'all rows':>10}{'IPC':>7}")
    for loop in LOOPS:
        body = inner_loop(build, loop)
        products = work_of(body, loop.work)
        for core in (core for core, tiers in CORES.items() if loop.tier in tiers):
            taken = cycles(body, core)
            row = {
                "loop": loop.name,
                "tier": loop.tier,
                "core": core,
                "instructions": len(body),
                "cycles": round(taken, 3),
                "weights": products / loop.rows,
                "cycles_per_weight": round(taken / products * loop.rows, 4),
                "cycles_per_weight_and_row": round(taken / products, 4),
            }
            rows.append(row)
            per_row, per_weight = row["cycles_per_weight_and_row"], row["cycles_per_weight"]
            print(f"{loop.name:40}{loop.tier:10}{core:13}{per_row:11.3f}{per_weight:10.3f}{len(body) / taken:7.2f}")
    version = subprocess.run([program("llvm-mca"), "--version"], check=True, capture_output=True, text=True).stdout
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    conditions = {"llvm": re.findall(r"LLVM version (\S+)", version)[0], "commit": commit}
    (HERE / "results/neon_cycles.json").write_text(json.dumps({**conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
