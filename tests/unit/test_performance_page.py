"""docs/performance.md: what its generator makes of results."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator():
    specification = importlib.util.spec_from_file_location("generate_performance", DOCS / "generate_performance.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_board_asks_for_its_bandwidth_over_its_clocks(generator):
    board = generator.Board("made up", multiprocessors=10, megahertz=1000, gigabytes=100.0)
    assert board.demand == 10.0


def test_a_prediction_is_what_the_kernel_takes_of_what_is_needed_and_no_more_than_a_copy(generator):
    machine = {"multiprocessors": 100, "clock_kilohertz": 1000000}
    memory = {"results": [{"work": "slow", "bytes": 8e5, "microseconds": 2.0}]}
    product = {"M": 1, "bytes": 1e6, "microseconds": 1.0}
    rows = [{"work": work, "bytes_per_clock_and_multiprocessor": taken} for work, taken in (("slow", 5.0), ("fast", 40.0))]
    slow, fast = generator.predictions(memory, [product], {"machine": machine, "results": rows}).splitlines()
    shares = [f"{5.0 / board.demand:.0%}" for board in generator.BOARDS]
    assert slow == "| " + " | ".join(["`slow`", "4.0", "5.0", *shares]) + " |"
    assert fast == "| " + " | ".join(["`fast`", "-", "40.0", *["82%"] * len(shares)]) + " |"


def test_the_page_has_every_kernel_that_was_measured(generator):
    page = generator.PAGE.read_text(encoding="utf-8")
    rendered = generator.render()
    for name in ("memory_bound", "resident", "host"):
        for row in generator.load(name)["results"]:
            assert f"`{row['work']}`" in page
            assert f"`{row['work']}`" in rendered


def test_the_plot_is_small_and_has_every_weight(generator, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    products = generator.load("vs_bitsandbytes")["gemm_4bit"]
    generator.plot(generator.load("memory_bound")["results"], products, path)
    drawing = path.read_text(encoding="utf-8")
    assert len(drawing) < 100_000
    for row in products:
        assert f"{row['N']}x{row['K']}" in drawing
