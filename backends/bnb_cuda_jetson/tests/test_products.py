"""Which kernels multiply: by rows of x, dtype, layout and alignment, on a made-up device of eight multiprocessors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from bnb_cuda_jetson import _native, panels

ARCHITECTURES = _native.architectures()
FLOAT32, FLOAT16, BFLOAT16 = range(3)
with_tensor_cores = pytest.mark.skipif(max(ARCHITECTURES) < 80, reason="built without code for sm_80 or newer")

GEMM = """
weight = {packed}, 12288, 16384, {blocksize}, {N}, {K}
_native.gemm_4bit(0, 0, 4096, {dtype}, {x}, {M}, *weight, 0, {nested}, {nested}, {nested}, 256, 8192, "{path}")
"""
INT8 = "_native.int8_linear(0, 0, 4096, 1, 8192, {codes}, 16384, 0, {threshold}, {rows}, {N}, {K}, 65536)\n"


def launches(run, *calls: str) -> list:
    """Return the name and the grid of each launch of these calls, made in one process."""
    return [tuple(call.split()[:2]) for call in run("".join(calls), str(max(ARCHITECTURES))).calls_of("cuLaunchKernel")]


def names(run, *calls: str) -> list:
    return [name for name, _ in launches(run, *calls)]


def gemm(**settings) -> str:
    call = {
        "dtype": BFLOAT16,
        "x": 4096,
        "M": 1,
        "packed": 8192,
        "blocksize": 64,
        "N": 256,
        "K": 512,
        "nested": 0,
        "path": "automatic",
    }
    call.update(settings)
    return GEMM.format(**call)


def int8(**settings) -> str:
    return INT8.format(**{"rows": 1, "N": 256, "K": 512, "threshold": 0.0, "codes": 12288, **settings})


@with_tensor_cores
def test_few_rows_on_tensor_cores(run_with_driver):
    sixteen = "wide_rows16" if max(ARCHITECTURES) >= 90 else "rows16"
    kernels = {1: "one", 2: "rows4", 4: "rows4", 5: "rows8", 8: "rows8", 9: sixteen, 16: sixteen}
    plain = [gemm(M=M) for M in kernels]
    nested = [gemm(M=M, dtype=FLOAT16, nested=512) for M in kernels]
    expected = [f"gemm_4bit_few_{kernel}_bfloat16" for kernel in kernels.values()]
    expected += [f"gemm_4bit_few_{kernel}_float16_nested" for kernel in kernels.values()]
    assert names(run_with_driver, *plain, *nested) == expected


@with_tensor_cores
def test_few_rows_whose_runs_of_64_have_several_scales(run_with_driver):
    assert names(run_with_driver, gemm(blocksize=32), gemm(K=480)) == ["gemm_4bit_few_blocks32_bfloat16"] * 2


def test_few_rows_of_float32_are_not_rounded(run_with_driver):
    assert names(run_with_driver, *(gemm(dtype=FLOAT32, M=M) for M in (1, 2, 9))) == [
        "gemm_4bit_few_scalar1_float32",
        "gemm_4bit_few_scalar2_float32",
        "gemm_4bit_any_float32",
    ]


def test_what_cannot_be_read_sixteen_bytes_at_a_time(run_with_driver):
    calls = gemm(K=511), gemm(K=500), gemm(packed=8195), gemm(x=4098)
    assert launches(run_with_driver, *calls) == [("gemm_4bit_any_bfloat16", "4x1x1")] * 4


@with_tensor_cores
def test_many_rows_share_columns_where_there_are_few_blocks(run_with_driver):
    """Two tiles of 128 rows of W on eight multiprocessors: four blocks each, if each has two stages of 128 columns."""
    assert launches(run_with_driver, gemm(M=64, K=4096), gemm(M=32, N=4096, K=256), gemm(M=65, N=512, K=512)) == [
        ("gemm_4bit_many64_bfloat16", "2x1x4"),
        ("gemm_4bit_add_bfloat16", "16x1x1"),
        ("gemm_4bit_many32_bfloat16", "32x1x1"),
        ("gemm_4bit_many64_bfloat16", "4x2x1"),
    ]


@with_tensor_cores
def test_small_products_of_many_rows_take_a_kernel_for_few(run_with_driver):
    assert names(run_with_driver, gemm(M=17), gemm(M=32)) == ["gemm_4bit_few_rows32_bfloat16"] * 2


@with_tensor_cores
def test_tiles_of_many_rows_by_what_they_are_estimated_to_take(run_with_driver):
    """More rows of x in a tile use a code more often; fewer make more blocks where there are few rows of W."""
    calls = gemm(M=64, N=4096), gemm(M=128, N=4096), gemm(M=128, N=4096, nested=512), gemm(M=64, N=256, K=256)
    assert names(run_with_driver, *calls) == [
        "gemm_4bit_many64_bfloat16",
        "gemm_4bit_many128_bfloat16",
        "gemm_4bit_many128_bfloat16_nested",
        "gemm_4bit_many32_bfloat16",
    ]


@with_tensor_cores
def test_one_row_of_a_larger_weight(run_with_driver):
    """From 64 Ki elements of W on a multiprocessor on; from 1 Mi on with two blocks. Nested scales take the kernel for few."""
    calls = gemm(N=1024), gemm(N=1032, K=8192), gemm(N=1024, nested=512), gemm(N=1024, blocksize=32)
    assert launches(run_with_driver, *calls) == [
        ("gemm_4bit_one_bfloat16", "8x1x1"),
        ("gemm_4bit_one_bfloat16", "16x1x1"),
        ("gemm_4bit_few_one_bfloat16_nested", "16x1x1"),
        ("gemm_4bit_few_blocks32_bfloat16", "16x1x1"),
    ]


OVERLAPPING = gemm(M=8) + gemm(N=1024) + gemm(M=64, K=4096)


@pytest.mark.skipif(max(ARCHITECTURES) < 90, reason="built without code for sm_90 or newer")
def test_products_begin_while_the_kernel_before_them_is_at_work(run_with_driver):
    run = run_with_driver(OVERLAPPING, str(max(ARCHITECTURES)))
    assert [call.endswith(" overlapping") for call in run.calls_of("cuLaunchKernel")] == [True] * 4


@with_tensor_cores
def test_an_older_driver_runs_one_kernel_after_the_other(run_with_driver):
    """CUDA graphs take such launches from 12.3 on."""
    run = run_with_driver(OVERLAPPING, str(max(ARCHITECTURES)), version=12020)
    assert [call.endswith(" overlapping") for call in run.calls_of("cuLaunchKernel")] == [False] * 4


@pytest.mark.skipif(not {80, 87} & set(ARCHITECTURES), reason="built without code for Ampere")
def test_an_older_device_runs_one_kernel_after_the_other(run_with_driver):
    run = run_with_driver(OVERLAPPING, str(min({80, 87} & set(ARCHITECTURES))))
    assert [call.endswith(" overlapping") for call in run.calls_of("cuLaunchKernel")] == [False] * 4


@with_tensor_cores
def test_a_path_can_be_named(run_with_driver):
    """Whatever the automatic choice is, which comes first among those that take a product."""
    code = "print(*_native.gemm_4bit_paths(0, 2, M, 1024, 512, 64, nested))\n"
    listed = "M, nested = 1, False\n" + code + "nested = True\n" + code + "M = 64\n" + code
    assert run_with_driver(listed, str(max(ARCHITECTURES))).output.splitlines() == [
        "one many few any",
        "few many any",
        "many few any",
    ]
    assert names(run_with_driver, *(gemm(N=1024, path=path) for path in ("many", "one", "few", "any"))) == [
        "gemm_4bit_many32_bfloat16",
        "gemm_4bit_one_bfloat16",
        "gemm_4bit_few_one_bfloat16",
        "gemm_4bit_any_bfloat16",
    ]


def test_a_path_that_does_not_take_the_product_is_refused(run_with_driver):
    for settings in ({"M": 2, "path": "one"}, {"path": "none"}, {"K": 500, "path": "few"}, {"x": 4098, "path": "many"}):
        refused = (
            "try:\n    " + gemm(**settings).strip().replace("\n", "\n    ") + "\nexcept ValueError as error:\n    print(error)"
        )
        output = run_with_driver(refused, str(max(ARCHITECTURES))).output
        assert output.startswith(f"gemm_4bit: no path '{settings['path']}' takes this product")


@with_tensor_cores
def test_scratch_holds_the_sums_of_every_part(run_with_driver):
    code = "print(*(_native.gemm_4bit_scratch(0, 2, M, 256, 4096, 64, False, 'automatic') for M in (16, 64, 1024)))"
    assert run_with_driver(code, str(max(ARCHITECTURES))).output.split() == ["0", str(4 * 4 * 64 * 256), "0"]


def test_rows_beyond_what_a_grid_holds_take_further_launches(run_with_driver):
    tiles = 65535
    assert launches(run_with_driver, gemm(M=tiles * 32 + 1, K=500, N=1)) == [
        ("gemm_4bit_any_bfloat16", f"1x{tiles}x1"),
        ("gemm_4bit_any_bfloat16", "1x1x1"),
    ]


def test_int8_of_few_rows_is_one_kernel(run_with_driver):
    calls = [int8(rows=rows, threshold=threshold) for rows in (1, 4) for threshold in (0.0, 6.0)]
    assert names(run_with_driver, *calls) == ["int8_linear_one_float16"] * 2 + ["int8_linear_four_float16"] * 2


@with_tensor_cores
def test_int8_of_many_rows_is_quantized_first(run_with_driver):
    quantize = ["int8_inspect_columns_float16", "int8_quantize_rows_float16"]
    expected = [*quantize, "int8_linear_few_float16", *quantize, "int8_linear_many_float16"]
    assert names(run_with_driver, int8(rows=16), int8(rows=17)) == expected


def test_int8_of_any_layout(run_with_driver):
    expected = ["int8_quantize_rows_float16", "int8_linear_any_float16"] * 2
    assert names(run_with_driver, int8(K=511), int8(codes=12290)) == expected


# ------------------------------------------------------------------------------------------------------------------------- panels

#: Clocks, multiprocessors and memory as the driver reports them.
H200 = SimpleNamespace(
    compute_capability=90, multiprocessors=132, clock_kilohertz=1_980_000, memory_clock_kilohertz=3_201_000, memory_bus_bits=6144
)
ORIN = SimpleNamespace(
    compute_capability=87, multiprocessors=16, clock_kilohertz=1_300_000, memory_clock_kilohertz=3_199_000, memory_bus_bits=256
)


@pytest.fixture
def device(request, monkeypatch):
    monkeypatch.setattr(panels, "_native", SimpleNamespace(device=lambda ordinal: request.param))
    panels.costs.cache_clear()
    panels.panel_size.cache_clear()
    yield request.param
    panels.costs.cache_clear()
    panels.panel_size.cache_clear()


@pytest.mark.parametrize("device", [H200], indirect=True)
@pytest.mark.parametrize(
    ("N", "K", "fused_up_to", "panels_from"),
    [(4096, 4096, 128, 256), (14336, 4096, 128, 256), (2048, 8192, 128, 256), (8192, 2048, 128, 256), (128256, 2048, 128, 256)],
)
def test_panels_are_chosen_where_they_were_measured_to_be_faster(device, N, K, fused_up_to, panels_from):
    assert panels.panel_size(0, fused_up_to, N, K, 64, False) == 0
    assert panels.panel_size(0, panels_from, N, K, 64, False) > 0


@pytest.mark.parametrize("device", [H200, ORIN], indirect=True)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_panel_stays_within_its_bytes(device, transposed):
    N, K = 14336, 4096
    size = panels.panel_size(0, 4096, N, K, 64, transposed)
    assert 0 < size * (N if transposed else K) * 2 <= panels.PANEL_BYTES
    assert size % 8 == 0


@pytest.mark.parametrize("device", [H200], indirect=True)
def test_a_small_weight_is_one_panel(device):
    assert panels.panel_size(0, 4096, 1000, 4096, 64, False) == 1000


@pytest.mark.parametrize("device", [SimpleNamespace(**{**vars(ORIN), "compute_capability": 72})], indirect=True)
def test_without_bfloat16_arithmetic_there_are_no_panels(device):
    assert panels.panel_size(0, 4096, 4096, 4096, 64, False) == 0


@pytest.mark.parametrize("device", [H200], indirect=True)
def test_columns_that_straddle_bytes_take_no_panels(device):
    assert panels.panel_size(0, 4096, 4096, 4095, 64, False) == 0
