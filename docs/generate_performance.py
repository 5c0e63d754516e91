"""Write performance.md and performance.svg from the figures in benchmarks/results: `python docs/generate_performance.py`."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PAGE, PLOT = DOCS / "performance.md", DOCS / "performance.svg"

Row = Dict[str, Any]


class Board(NamedTuple):
    """A Jetson: its multiprocessors, their clock, and the nominal speed of its memory."""

    name: str
    multiprocessors: int
    megahertz: int
    gigabytes: float

    @property
    def demand(self) -> float:
        """Bytes that a multiprocessor must take in a clock to keep the memory busy."""
        return self.gigabytes * 1e3 / (self.multiprocessors * self.megahertz)


#: NVIDIA's figures for the largest power mode.
BOARDS = (
    Board("AGX Xavier", 8, 1377, 136.5),
    Board("AGX Orin 64 GB", 16, 1300, 204.8),
    Board("Orin Nano 8 GB (Super)", 8, 1020, 102.0),
    Board("Thor T5000", 20, 1575, 273.0),
)
#: The most of its memory's nominal speed that any program reaches on a Jetson: a copy on AGX Xavier reached 81 to 83 %.
REACHABLE = 0.82

TEXT = """\
# Performance of the CUDA backend

<!-- Written by docs/generate_performance.py from benchmarks/results/gpu_*_h200.json; change these, not this file. -->

Measured on one {device} with bitsandbytes {peer} and torch {torch} in the same run: medians over replays of CUDA graphs, with
inputs that take turns so that caches do not help. Copies within that device move {copy:.2f} TB/s, bytes that are read and bytes
that are written counted. `nox -s gpu` runs all of it again.

![Products: times as fast as bitsandbytes, by weight and rows; memory-bound work: share of a copy's speed](performance.svg)

## Memory-bound work

| work | time | share of a copy's speed | bitsandbytes takes |
|---|---|---|---|
{memory_bound}

## Products with NF4 weights

bfloat16 rows, over {shapes} shapes of weights from 896 x 896 to 128256 x 2048: the least, the median and the most over the shapes.

| rows | times as fast as bitsandbytes | as bfloat16 `F.linear` of the unquantized weight | share of a copy's speed |
|---|---|---|---|
{products}

## Host time

What Python and the driver take for a call whose work on the device is small.

| call | time | bitsandbytes |
|---|---|---|
{host}

## A whole model

{parameters:.1f} B parameters in the shape of TinyLlama, random weights, bfloat16 where not quantized. Decoding is one token at a
time through a CUDA graph, with torch's own attention; training is forward, backward and step with {batch}.

| decoding | ours | bitsandbytes |
|---|---|---|
{decoding}

| training | ours | bitsandbytes | torch's AdamW |
|---|---|---|---|
{training}

## What it means on a Jetson

No Jetson was at hand: **this section is a prediction.** To fill its memory's bandwidth, a multiprocessor of a Jetson must take

{demands}

bytes in a clock, reads and writes counted. So what decides is not how many bytes a kernel moves in a second on an {device}, but
how many each multiprocessor takes in a clock where memory does not hold it up. That is measured with inputs that lie in the L2
cache (`python benchmarks/gpu_resident.py`); from memory, a multiprocessor of the {device} gets {most:.1f} bytes a clock at most.
Where that is the smaller of the two it is a lower bound: of a call whose tensors fit into the cache, the launch, its tables and the
wait for the last threads are a large part.

The prediction is the smaller of {reachable:.0%}, which is what a copy reaches on AGX Xavier, and of what the kernel takes from the
cache in relation to what is needed. It assumes that

- a multiprocessor of the Jetson does in a clock what one of the {device} does. Both start four instructions a clock; AGX Xavier's
  has half of the float32 lanes, and Orin's half of the units that load, so kernels that are bound by these come out lower;
- clocks are those of the largest power mode, and nothing else uses the memory: the CPU and the display share it;
- tensors are large enough to give every multiprocessor work, and do not fit into the Jetson's L2 cache;
- on Xavier, bfloat16 arithmetic is done in float32 and loads are not asynchronous, which the prediction does not know.

| kernel | bytes a clock and multiprocessor, from memory | from the cache | {boards} |
|---|---|---|{columns}|
{predictions}
"""


def load(name: str) -> Any:
    """Read a file of results."""
    return json.loads((RESULTS / f"gpu_{name}_h200.json").read_text())


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return the body of a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ratio(row: Row) -> str:
    """Say how many times as long bitsandbytes takes."""
    return f"{row['bitsandbytes'] / row['microseconds']:.1f} times as long" if row["bitsandbytes"] else "-"


def spread(values: List[float], form: str) -> str:
    """Return the least, the median and the most."""
    return " / ".join(form.format(value) for value in (min(values), statistics.median(values), max(values)))


def memory_bound(rows: Sequence[Row]) -> str:
    """Return the table of kernels that only move memory."""
    return table(
        (f"`{row['work']}`", f"{row['microseconds']:.1f} µs", f"{row['share_of_copy_bandwidth']:.0%}", ratio(row)) for row in rows
    )


def products(rows: Sequence[Row]) -> str:
    """Return the table of products, by rows of x."""
    lines = []
    for M in sorted({row["M"] for row in rows}):
        of_M = [row for row in rows if row["M"] == M]
        against = [[row[peer] / row["microseconds"] for row in of_M] for peer in ("bitsandbytes", "bfloat16")]
        shares = [row["share_of_copy_bandwidth"] for row in of_M]
        lines.append((str(M), *(spread(values, "{:.1f}") for values in against), spread(shares, "{:.0%}")))
    return table(lines)


def host(rows: Sequence[Row]) -> str:
    """Return the table of host times."""

    def time(value: Any) -> str:
        return f"{value:.1f} µs" if value else "-"

    return table((f"`{row['work']}`", time(row["microseconds"]), time(row["bitsandbytes"])) for row in rows)


def decoding(rows: Sequence[Row]) -> str:
    """Return the table of decoding."""
    by_format: Dict[str, Dict[str, Row]] = {}
    for row in rows:
        by_format.setdefault(row["format"], {})[row["library"]] = row

    def speed(row: Row) -> str:
        return f"{row['tokens_per_second']:.0f} tokens/s" + ("" if row["captured"] else ", not capturable")

    plain = by_format.pop("bfloat16")["torch"]
    lines = [(name, speed(of["ours"]), speed(of["bitsandbytes"])) for name, of in by_format.items()]
    return table([*lines, ("not quantized: bfloat16", speed(plain), speed(plain))])


def training(rows: Sequence[Row]) -> str:
    """Return the table of training."""
    of = {row["library"]: row for row in rows}
    order = [of[library] for library in ("ours", "bitsandbytes", "torch")]
    return table(
        [
            ("a step in all", *(f"{row['milliseconds']:.1f} ms" for row in order)),
            ("of which the optimizer", *(f"{row['step_milliseconds']:.2f} ms" for row in order)),
            ("its states", *(f"{row['state_bytes'] / 2**20:.0f} MiB" for row in order)),
            (f"loss after {len(order[0]['losses'])} steps", *(f"{row['losses'][-1]:.3f}" for row in order)),
        ]
    )


def predictions(memory: Any, product_rows: Sequence[Row], resident: Any) -> str:
    """Return the table of what each kernel is expected to reach on each board."""
    clocks = resident["machine"]["multiprocessors"] * resident["machine"]["clock_kilohertz"] / 1e3
    measured = {row["work"]: row["bytes"] / row["microseconds"] / clocks for row in memory["results"]}
    largest = max((row for row in product_rows if row["M"] == 1), key=lambda row: row["bytes"])
    measured["gemm_4bit nf4, one row"] = largest["bytes"] / largest["microseconds"] / clocks
    lines = []
    for row in resident["results"]:
        taken = row["bytes_per_clock_and_multiprocessor"]
        from_memory = f"{measured[row['work']]:.1f}" if row["work"] in measured else "-"
        shares = (min(REACHABLE, taken / board.demand) for board in BOARDS)
        lines.append((f"`{row['work']}`", from_memory, f"{taken:.1f}", *(f"{share:.0%}" for share in shares)))
    return table(lines)


def render() -> str:
    """Return the page."""
    memory, against, resident, whole = (load(name) for name in ("memory_bound", "vs_bitsandbytes", "resident", "end_to_end"))
    clocks = resident["machine"]["multiprocessors"] * resident["machine"]["clock_kilohertz"] * 1e3
    shape = whole["shape"]
    attention = shape["hidden"] ** 2 * (2 + 2 * shape["key_heads"] / shape["heads"])
    layer = attention + 3 * shape["hidden"] * shape["intermediate"]
    return TEXT.format(
        device=memory["device"],
        peer=memory["bitsandbytes"],
        torch=memory["torch"],
        copy=memory["copy_bytes_per_second"] / 1e12,
        most=memory["copy_bytes_per_second"] / clocks,
        memory_bound=memory_bound(memory["results"]),
        shapes=len({(row["N"], row["K"]) for row in against["gemm_4bit"]}),
        products=products(against["gemm_4bit"]),
        host=host(load("host")["results"]),
        parameters=(shape["layers"] * layer + 2 * shape["vocabulary"] * shape["hidden"]) / 1e9,
        batch="4 sequences of 512 tokens",
        decoding=decoding(whole["decoding"]),
        training=training(whole["training"]),
        demands="\n".join(f"- {board.name}: **{board.demand:.1f}**" for board in BOARDS),
        reachable=REACHABLE,
        boards=" | ".join(board.name for board in BOARDS),
        columns="|".join("---" for _ in BOARDS),
        predictions=predictions(memory, against["gemm_4bit"], resident),
    )


def plot(memory: Sequence[Row], product_rows: Sequence[Row], path: Path) -> None:
    """Draw the ratio to bitsandbytes over shapes, and shares of a copy's speed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: that would choose a display

    with rc_context({"svg.hashsalt": "performance", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(10, 8), layout="constrained")
        ratios, shares = figure.subplots(1, 2)
        weights = sorted({(row["N"], row["K"]) for row in product_rows}, key=lambda weight: (weight[0] * weight[1], weight))
        rows = sorted({row["M"] for row in product_rows})
        times_as_fast = {(row["N"], row["K"], row["M"]): row["bitsandbytes"] / row["microseconds"] for row in product_rows}
        grid = [[times_as_fast[(*weight, M)] for M in rows] for weight in weights]
        ratios.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=0, vmax=2, alpha=0.6)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ratios.text(x, y, f"{value:.1f}", ha="center", va="center")
        ratios.set_xticks(range(len(rows)), [str(M) for M in rows])
        ratios.set_yticks(range(len(weights)), [f"{N}x{K}" for N, K in weights])
        ratios.set_xlabel("rows of x")
        ratios.set_title("gemm_4bit: times as fast as bitsandbytes")
        places = range(len(memory))
        shares.barh(places, [row["share_of_copy_bandwidth"] for row in memory], height=0.7, label="ours")
        times_as_long = [row["bitsandbytes"] / row["microseconds"] if row["bitsandbytes"] else math.inf for row in memory]
        theirs = [row["share_of_copy_bandwidth"] / times for row, times in zip(memory, times_as_long)]
        shares.barh(places, theirs, height=0.35, label="bitsandbytes")
        shares.set_yticks(places, [row["work"] for row in memory])
        shares.invert_yaxis()
        shares.set_xlim(0, 1)
        shares.set_title("share of a copy's speed")
        shares.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), ncol=2)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    plot(load("memory_bound")["results"], load("vs_bitsandbytes")["gemm_4bit"], PLOT)
