"""Count the aarch64 instructions that bnb-cpu-neon and bitsandbytes execute for the same calls, in emulation.

    python benchmarks/neon_instructions.py DIST [--folder FOLDER] [--cpu cortex-a76] [--without-peer]

DIST holds the wheels of bnb-core, bnb-reference and bnb-cpu-neon (`nox -s neon-wheels-3.12 arm` leaves them in dist/). Needs
Debian's qemu-user, and gcc. Counts are of whole Python calls with one thread, by element of the weight. They are exact, the same in
every run, and stand in for time where there is no aarch64 machine; they are not cycles.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any, Dict, Tuple

HERE = Path(__file__).parent
PEER = "bitsandbytes==0.50.2"

#: At most so many instructions for each element of 1024 by 1024; other shapes may take 1.3 times that.
TARGETS = {
    "quantize_4bit": 6.0,
    "dequantize_4bit": 1.6,
    "quantize_blockwise": 7.6,
    "quantize_blockwise linear map": 15.0,
    "dequantize_blockwise": 2.6,
    **{f"Linear4bit {dtype} M={M}": most for dtype in ("fp32", "fp16", "bf16") for M, most in ((1, 1.7), (16, 6.5), (64, 22.0))},
    **{
        f"Linear4bit fast {dtype} M={M}": most
        for dtype in ("fp32", "fp16", "bf16")
        for M, most in ((1, 0.5), (16, 6.5), (64, 22.0))
    },
    **{f"Linear8bitLt fp16 M={M}": most for M, most in ((1, 0.4), (16, 1.6), (64, 5.5))},
    "AdamW8bit.step": 20.0,
    "Lion8bit.step": 11.0,
}
Counts = Dict[Tuple[str, str], float]


def load_tool(name: str) -> Any:
    """Import a module of the backend's `tools` folder, which is no package."""
    path = HERE.parent / "backends/bnb_cpu_neon/tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count(arm: Any, package: str, cpu: str, folder: Path) -> Counts:
    """Return the instructions for each element, by shape and call."""
    plugin, totals, made = folder / "count.so", folder / "counts.txt", folder / "calls.json"
    compile_plugin = ["gcc", "-shared", "-fPIC", "-O2", "-Wl,-z,undefs", "-o", str(plugin), str(HERE / "qemu_instruction_count.c")]
    subprocess.run(compile_plugin, check=True)
    guest = str(HERE / "neon_instructions_guest.py")
    arm.run(guest, package, str(made), cpu=cpu, plugin=f"{plugin},out={totals}", environment={"BNB_BACKEND": "neon"})
    marks = [int(line) for line in totals.read_text().split()]
    counts = {}
    for i, (shape, name, elements) in enumerate(json.loads(made.read_text())):
        start, between, end = marks[3 * i : 3 * i + 3]
        counts[shape, name] = ((end - between) - (between - start)) / elements  # less what asking takes
    return counts


def main() -> None:
    """Count, print a table, and store the figures in benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dist", type=Path, help="folder with the wheels")
    parser.add_argument("--folder", type=Path, default=Path("emulated-arm"), help="where the aarch64 Python is put, and kept")
    parser.add_argument("--cpu", default="cortex-a76", help="QEMU's name of the CPU")
    parser.add_argument("--without-peer", action="store_true", help="leave bitsandbytes out")
    arguments = parser.parse_args()
    tool = load_tool("emulated_arm")
    arm = tool.EmulatedArm(arguments.folder)
    arm.install(*tool.newest_wheels(arguments.dist))
    sides = {"bnb_core": count(arm, "bnb_core", arguments.cpu, arguments.folder.resolve())}
    if not arguments.without_peer:
        arm.install(PEER)
        sides["bitsandbytes"] = count(arm, "bitsandbytes", arguments.cpu, arguments.folder.resolve())
    rows = []
    print(f"{'instructions for each element':45}{'bitsandbytes':>14}{'ours':>9}{'target':>9}")
    for (shape, name), ours in sides["bnb_core"].items():
        target = TARGETS[name] * (1.0 if shape == "1024x1024" else 1.3)
        peer = sides.get("bitsandbytes", {}).get((shape, name))
        rows.append({"shape": shape, "call": name, "bitsandbytes": peer, "ours": round(ours, 3), "target": round(target, 3)})
        shown = "-" if peer is None else f"{peer:.2f}"
        print(f"{shape + ' ' + name:45}{shown:>14}{ours:>9.2f}{target:>9.2f}  {'' if ours <= target else 'above the target'}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    emulator = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
    conditions = {
        "cpu": arguments.cpu,
        "emulator": emulator,
        "torch": arm.release.versions["torch"],
        "peer": PEER,
        "commit": commit,
        "threads": 1,
    }
    result = HERE / "results" / f"neon_instructions_{arguments.cpu}.json"
    result.write_text(json.dumps({**conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
