"""Which path a product takes: what was measured where there is a table, an estimate elsewhere; and the memory that it needs."""

from __future__ import annotations

import json

import pytest
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.paths import PANEL_BYTES, panel_lines

ARCHITECTURES = _native.architectures()
NEWEST = str(max(ARCHITECTURES))
FLOAT32, FLOAT16, BFLOAT16 = range(3)
#: Multiprocessors, clock, memory's clock and its bus, and whether it is integrated, by their numbers in cuda.h.
H200 = "16=132,13=1980000,36=3201000,37=6144,18=0"

pytestmark = pytest.mark.skipif(max(ARCHITECTURES) < 80, reason="built without code for sm_80 or newer")

PROGRAM = """
from bnb_core.backends import tuning
from bnb_cuda_jetson import choice

def choose(dtype=2, M=1, N=4096, K=4096, blocksize=64, nested_blocksize=0, alignment=0):
    return choice.choose(0, dtype, M, N, K, blocksize, nested_blocksize, alignment)

def measured(times, dtype=2, N=4096, K=4096, nested=False):
    cases = {choice.case_name(dtype, N, K, M, nested): values for M, values in times.items()}
    tuning.write(tuning.Table("jetson", choice.identity(0), "now", cases))
    choice.choose.cache_clear()
"""


@pytest.fixture
def on_h200(run_with_driver):
    """Run a program on a made-up H200, and return the words that it printed."""
    return lambda code: run_with_driver(PROGRAM + code, NEWEST, attributes=H200).output.split()


def test_estimates_choose_where_nothing_was_measured(on_h200):
    paths = on_h200("for M in (1, 8, 16, 32, 64, 128, 512, 4096):\n    print(choose(M=M).path)")
    assert paths == ["one", "few", "few", "many32", "many64", "many128", "panels", "panels"]


def test_products_that_few_paths_take(on_h200):
    code = """
print(choose(dtype=0, M=512).path, choose(M=1, nested_blocksize=256).path, choose(dtype=1, M=4096).path)
print(choose(M=16, alignment=2).path, choose(M=4096, alignment=2).path, choose(M=4096, alignment=4).path)
print(choose(K=4095, M=4096).path, choose(K=4000, M=1).path, choose(M=1, nested_blocksize=200).path, choose(blocksize=32, M=1).path)
"""
    assert on_h200(code) == ["any", "few", "many128", "any", "any", "panels", "any", "few", "any", "few"]


def test_float32_has_the_kernel_for_few_rows_until_that_for_any_is_faster(on_h200):
    """A tile of the latter takes 0.1 us a column, however few rows there are."""
    paths = on_h200("for M in (1, 8, 16, 32, 256):\n    print(choose(dtype=0, M=M, N=2048, K=2048).path)")
    assert paths == ["few", "few", "few", "few", "any"]


def test_memory(on_h200):
    """Sums of the parts that share columns, a panel, or nothing."""
    code = """
for M in (1, 64, 4096):
    print(*choose(M=M, N=1024)[1:])
print(*choose(M=4096, N=14336)[1:])
"""
    parts, stages = _native.gemm_4bit_cut(132, 32, 64, 1024, 4096)
    assert parts * stages == 4096 / 128
    assert parts > 1
    lines = panel_lines(14336, 4096)
    sums, panels = [0, 4 * parts * 64 * 1024], [1024, 2 * 1024 * 4096, lines, 2 * lines * 4096]
    assert [int(word) for word in on_h200(code)] == [0, 0, *sums, *panels]


@pytest.mark.parametrize(("lines", "length"), [(14336, 4096), (4096, 14336), (128256, 2048), (1000, 4096), (1 << 21, 7)])
def test_a_panel_stays_within_its_bytes(lines, length):
    size = panel_lines(lines, length)
    assert 0 < 2 * size * length <= PANEL_BYTES
    assert size == lines or (size % 8 == 0 and 2 * (size + 8) * length > PANEL_BYTES)


def test_gradients_take_panels_from_where_they_pay(on_h200):
    code = """
for M in (1, 31, 64, 512):
    print(choice.choose_transposed(0, 2, M, 14336, 4096, 64, 0).path)
print(*choice.choose_transposed(0, 2, 512, 14336, 4096, 64, 0)[1:])
print(choice.choose_transposed(0, 1, 512, 14336, 4096, 64, 0).path, choice.choose_transposed(0, 2, 512, 14336, 4095, 64, 0).path)
"""
    columns = panel_lines(4096, 14336)
    assert on_h200(code) == ["any", "any", "panels", "panels", str(columns), str(2 * columns * 14336), "any", "any"]


# --------------------------------------------------------------------------------------------------------------------- by a table


def test_what_was_measured_the_fastest_is_chosen(on_h200):
    code = """
measured({1: {"one": 9.0, "few": 5.0}, 16: {"few": 9.0, "many64": 5.0}, 64: {"many64": 9.0, "panels": 5.0}})
for M in (1, 2, 9, 16, 17, 64, 65, 4096):
    print(choose(M=M).path)
"""
    # Rows in between have the choice of the next larger number. Where that was not measured, as 2, 128 and 512, estimates choose.
    assert on_h200(code) == ["few", "few", "many64", "many64", "many32", "panels", "many128", "panels"]


def test_rows_beyond_what_is_measured_have_the_choice_of_the_largest(on_h200):
    assert (
        on_h200('measured({512: {"many128": 5.0, "panels": 9.0}})\nprint(choose(M=512).path, choose(M=8192).path)')
        == ["many128"] * 2
    )


def test_a_table_holds_for_its_shapes_and_dtypes(on_h200):
    code = """
measured({64: {"few": 5.0, "many64": 9.0}})
print(choose(M=64).path, choose(M=64, N=4104).path, choose(M=64, K=4160).path, choose(M=64, dtype=1).path)
"""
    assert on_h200(code) == ["few", "many64", "many64", "many64"]


def test_a_path_that_does_not_take_the_product_is_not_chosen(on_h200):
    """As where codes are aligned less; nor one that this version does not have."""
    code = """
measured({1: {"one": 1.0, "few": 5.0, "future": 0.1}, 64: {"many64": 1.0, "panels": 5.0, "any": 7.0}})
print(choose(M=1).path, choose(M=64, alignment=4).path, choose(M=64, alignment=2).path)
measured({64: {"future": 0.1}})
print(choose(M=64).path)
"""
    assert on_h200(code) == ["one", "panels", "any", "many64"]


def test_nested_scales_are_measured_apart_for_few_rows(on_h200):
    code = """
measured({1: {"one": 1.0, "few": 5.0}, 16: {"many64": 1.0, "few": 5.0}, 64: {"many32": 1.0, "panels": 5.0}})
for M in (1, 9, 64):
    print(choose(M=M, nested_blocksize=256).path)
measured({16: {"many64": 1.0, "few": 5.0}}, nested=True)
print(choose(M=9, nested_blocksize=256).path, choose(M=9).path)
"""
    assert on_h200(code) == ["few", "many32", "many32", "many64", "few"]


def test_a_table_of_another_driver_is_ignored_with_one_warning(run_with_driver):
    write = PROGRAM + 'measured({64: {"few": 5.0, "many64": 9.0}})\nprint(choose(M=64).path)'
    assert run_with_driver(write, NEWEST, attributes=H200).output.split() == ["few"]
    read = (
        PROGRAM
        + """
import logging
logging.basicConfig(stream=__import__("sys").stdout, format="%(levelname)s %(message)s")
print(choose(M=64).path, choose(M=63).path)
"""
    )
    lines = run_with_driver(read, NEWEST, attributes=H200, version=12040).output.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("WARNING ignoring ")
    assert "it was measured with driver 13.0 and not 12.4" in lines[0]
    assert lines[1] == "many64 many64"


def test_a_table_is_read_once(on_h200):
    code = """
measured({64: {"few": 5.0, "many64": 9.0}})
print(choose(M=64).path)
tuning.table_file("jetson", choice.identity(0).device).unlink()
print(choose(M=63).path)
from bnb_core.backends import refresh
refresh()
print(choose(M=64).path)
"""
    assert on_h200(code) == ["few", "few", "many64"]


# ------------------------------------------------------------------------------------------------------------------------ the hook

TUNE = """
import bnb_cuda_jetson
from bnb_core.backends import register
from bnb_core.cli import main
from bnb_cuda_jetson import tuning

def measure(ordinal, dtype, M, N, K, nested, likely):
    return {path: 100.0 - number for number, path in enumerate(likely)}  # the last is the fastest

tuning._measure = measure
register(bnb_cuda_jetson, "jetson")
main(["tune", "--backend", "jetson", "--json", *ARGUMENTS], standalone_mode=False)
"""


@pytest.fixture
def tune(run_with_driver):
    """Run `bnb tune` on a made-up H200, and return its result."""

    def tune(*arguments, capabilities=NEWEST):
        run = run_with_driver(f"ARGUMENTS = {arguments!r}\n" + TUNE, capabilities, attributes=H200)
        return json.loads(run.output)[0]

    return tune


def test_what_is_measured(tune):
    result = tune()
    assert result["device"] == f"Fake {NEWEST}, 132 multiprocessors"
    assert set(result["conditions"]) == {"driver", "clock", "torch", "bnb-cuda-jetson"}
    assert (result["conditions"]["driver"], result["conditions"]["clock"]) == ("13.0", "1980 MHz")
    cases = result["cases"]
    assert set(cases["bfloat16 4096x4096, 1 row"]["microseconds"]) == {"one", "few"}
    assert set(cases["bfloat16 4096x4096, 128 rows"]["microseconds"]) >= {"many64", "many128", "panels"}
    assert "panels" not in cases["float16 4096x4096, 128 rows"]["microseconds"]
    assert set(cases["bfloat16 4096x4096 nested, 16 rows"]["microseconds"]) >= {"few", "many32"}
    assert "bfloat16 4096x4096 nested, 128 rows" not in cases
    assert all(len(case["microseconds"]) > 1 for case in cases.values()), "a case without a choice"
    assert not [case for case in cases.values() if "any" in case["microseconds"]], "a path that cannot be the fastest"


def test_what_was_tuned_is_used(tune, on_h200):
    result = tune("--shape", "4096x4096")
    code = "for M in (1, 32, 128, 512):\n    print(choose(M=M).path)"
    names = ("1 row", "32 rows", "128 rows", "512 rows")
    assert on_h200(code) == [result["cases"][f"bfloat16 4096x4096, {name}"]["fastest"] for name in names]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--device", "cuda:3"), f"there is no CUDA device 'cuda:3' to tune for; there are: cuda:0 (Fake {NEWEST})"),
        (("--device", "cpu"), "there is no CUDA device 'cpu' to tune for"),
        (("--shape", "10x33"), "a weight of 10x33 has nothing to measure: its columns are not a multiple of 32"),
    ],
)
def test_mistakes(run_with_driver, arguments, text):
    code = f"ARGUMENTS = {arguments!r}\n" + TUNE.replace("main(", "from click import ClickException\ntry:\n    main(")
    run = run_with_driver(code + "except ClickException as error:\n    print(error.message)\n", NEWEST, attributes=H200)
    assert text in run.output


def test_a_device_that_there_is_no_code_for(run_with_driver):
    code = (
        "from bnb_cuda_jetson import tuning\ntry:\n    tuning.tuning('cuda:1', ())\nexcept Exception as error:\n    print(error)\n"
    )
    assert "this package has no code for cuda:1 (Fake 61)" in run_with_driver(code, f"{NEWEST},61").output


def test_the_doctor_says_that_there_is_no_table(run_with_driver):
    code = """
import bnb_cuda_jetson
from bnb_core.backends import register
from bnb_core.backends.doctor import examine
register(bnb_cuda_jetson, "jetson")
print(*(check.message for check in examine("cuda").checks if check.message.startswith("jetson")), sep="\\n")
"""
    run = run_with_driver(code, NEWEST)
    assert f"jetson: not tuned for Fake {NEWEST}, 8 multiprocessors; `bnb tune` measures" in run.output
    assert not run.calls_of("cuDevicePrimaryCtxRetain"), "looking for a table made a context"


def test_what_is_measured_is_the_path_by_its_name(run_with_driver):
    """On the made-up device nothing is timed, but launched."""
    code = """
import torch
from bnb_cuda_jetson import tuning
from bnb_cuda_jetson.choice import with_memory

torch.Tensor.get_device = lambda tensor: 0
N, K = 256, 4096
packed, codes, absmax = torch.zeros(N * K // 2).byte(), torch.zeros(N * K // 64).byte(), torch.zeros(N * K // 64)
statistics = tuning.Nested(torch.zeros(64), torch.zeros(256), torch.zeros(()), 256)
weight = tuning.Weight(packed, absmax, codes, statistics)
for M, path, nested in ((1, "one", False), (1, "few", True), (64, "many64", False), (64, "many128", True)):
    x, out = torch.zeros(M, K, dtype=torch.bfloat16), torch.zeros(M, N, dtype=torch.bfloat16)
    choice = with_memory(0, 2, M, N, K, 64, 256 * nested, path)
    scratch = torch.empty(choice.scratch, dtype=torch.uint8)
    tuning._multiply(choice, x, weight, nested, torch.zeros(16), out, scratch)
"""
    names = [call.split()[0] for call in run_with_driver(code, NEWEST).calls_of("cuLaunchKernel")]
    assert [name for name in names if "_add_" not in name] == [
        "gemm_4bit_one_bfloat16",
        "gemm_4bit_few_one_bfloat16_nested",
        "gemm_4bit_many64_bfloat16",
        "gemm_4bit_many128_bfloat16_nested",
    ]
