"""Which kernels multiply: by path, rows of x, dtype and layout, on a made-up device of eight multiprocessors."""

from __future__ import annotations

import pytest
from bnb_cuda_jetson import _native

ARCHITECTURES = _native.architectures()
FLOAT32, FLOAT16, BFLOAT16 = range(3)
with_tensor_cores = pytest.mark.skipif(max(ARCHITECTURES) < 80, reason="built without code for sm_80 or newer")

GEMM = """
weight = {packed}, 12288, 16384, {blocksize}, {N}, {K}
_native.gemm_4bit(0, 0, 4096, {dtype}, {x}, {M}, *weight, 0, {nested}, {nested}, {nested}, 256, 8192, "{path}")
"""
INT8 = "_native.int8_linear(0, 0, 4096, 1, 8192, {codes}, 16384, 0, {threshold}, {rows}, {N}, {K}, 65536, '{path}')\n"


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
        "path": "few",
    }
    call.update(settings)
    return GEMM.format(**call)


def int8(**settings) -> str:
    return INT8.format(**{"rows": 1, "N": 256, "K": 512, "threshold": 0.0, "codes": 12288, "path": "automatic", **settings})


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
        "gemm_4bit_few_scalar2_float32",
    ]


def test_the_kernel_for_any_shape(run_with_driver):
    calls = gemm(K=511, path="any"), gemm(K=500, path="any"), gemm(packed=8195, path="any"), gemm(x=4098, path="any")
    assert launches(run_with_driver, *calls) == [("gemm_4bit_any_bfloat16", "4x1x1")] * 4


@with_tensor_cores
@pytest.mark.parametrize(
    ("kilobytes", "one_row", "many_rows", "rows_of_int8"),
    [
        (
            163,
            ["any", "one", "few", "wmma", "many32", "many64", "many128"],
            ["any", "few", "wmma", "many32", "many64", "many128"],
            "few",
        ),
        (99, ["any", "one", "wmma", "many32"], ["any", "wmma", "many32"], "few"),
        (64, ["any"], ["any"], "tensor"),
    ],
)
def test_kernels_that_a_block_has_no_shared_memory_for_are_left_out(run_with_driver, kilobytes, one_row, many_rows, rows_of_int8):
    code = f"for M in (1, 64): print(*_native.gemm_4bit_paths(0, {FLOAT16}, M, 4096, 4096, 64, False))\n"
    code += "print(_native.int8_paths(0, True, 1, 4096)[0])"
    run = run_with_driver(code, str(max(ARCHITECTURES)), attributes=f"97={kilobytes << 10}")
    assert run.output.split("\n")[:3] == [" ".join(one_row), " ".join(many_rows), rows_of_int8]


@with_tensor_cores
def test_many_rows_share_columns_where_there_are_few_blocks(run_with_driver):
    """Two tiles of 128 rows of W on eight multiprocessors: four blocks each, if each has two stages of 128 columns."""
    calls = gemm(M=64, K=4096, path="many64"), gemm(M=32, N=4096, K=256, path="many32"), gemm(M=65, N=512, K=512, path="many64")
    assert launches(run_with_driver, *calls) == [
        ("gemm_4bit_many64_bfloat16", "2x1x4"),
        ("gemm_4bit_add_bfloat16", "16x1x1"),
        ("gemm_4bit_many32_bfloat16", "32x1x1"),
        ("gemm_4bit_many64_bfloat16", "4x2x1"),
    ]


@with_tensor_cores
def test_more_rows_by_the_kernel_for_few(run_with_driver):
    assert names(run_with_driver, gemm(M=17), gemm(M=33)) == ["gemm_4bit_few_rows32_bfloat16"] * 2


@with_tensor_cores
def test_one_row_of_a_larger_weight(run_with_driver):
    """With two blocks on a multiprocessor from 1 Mi elements of W on each."""
    assert launches(run_with_driver, gemm(N=1024, path="one"), gemm(N=1032, K=8192, path="one")) == [
        ("gemm_4bit_one_bfloat16", "8x1x1"),
        ("gemm_4bit_one_bfloat16", "16x1x1"),
    ]


OVERLAPPING = gemm(M=8) + gemm(N=1024, path="one") + gemm(M=64, K=4096, path="many64")


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
def test_paths_that_take_a_product(run_with_driver):
    code = "print(*_native.gemm_4bit_paths(0, {dtype}, {M}, 1024, {K}, {blocksize}, {nested}))\n"
    many = "many32 many64 many128"
    cases = {
        f"any one few {many}": {},
        f"any few {many}": {"nested": True},
        f"any few {many} ": {"M": 64},
        "any few": {"dtype": FLOAT32},
        "any few ": {"K": 480},
        "any few  ": {"blocksize": 32},
        "any": {"K": 500},
    }
    default = {"dtype": BFLOAT16, "M": 1, "K": 512, "blocksize": 64, "nested": False}
    listed = "".join(code.format(**{**default, **case}) for case in cases.values())
    assert run_with_driver(listed, str(max(ARCHITECTURES))).output.splitlines() == [names.strip() for names in cases]


@pytest.mark.skipif(72 not in ARCHITECTURES, reason="built without code for Xavier")
def test_paths_on_xavier(run_with_driver):
    code = "print(*_native.gemm_4bit_paths(0, dtype, 64, 1024, 512, 64, False))\n"
    output = run_with_driver("for dtype in range(3):\n    " + code, "72").output
    assert output.splitlines() == ["any few", "any few wmma", "any few"]


def test_a_path_that_does_not_take_the_product_is_refused(run_with_driver):
    for settings in ({"M": 2, "path": "one"}, {"path": "none"}, {"K": 500, "path": "few"}, {"x": 4098, "path": "many64"}):
        refused = (
            "try:\n    " + gemm(**settings).strip().replace("\n", "\n    ") + "\nexcept ValueError as error:\n    print(error)"
        )
        output = run_with_driver(refused, str(max(ARCHITECTURES))).output
        assert output.startswith(f"gemm_4bit: no path '{settings['path']}' takes this product")


@pytest.mark.skipif(72 not in ARCHITECTURES, reason="built without code for Xavier")
def test_tensor_cores_of_xavier(run_with_driver):
    """Of float16 and int8; bfloat16 is a way to store there, and arithmetic is in float32."""
    calls = [gemm(dtype=FLOAT16, M=M, nested=M % 2 * 512, path="wmma") for M in (5, 16, 32, 33, 65)]
    calls += [int8(rows=4), int8(rows=5), int8(rows=17), int8(rows=5, K=520)]
    run = run_with_driver("".join(calls), "72")
    assert [
        tuple(call.split()[:2]) for call in run.calls_of("cuLaunchKernel") if "quantize" not in call and "inspect" not in call
    ] == [
        ("gemm_4bit_wmma16", "2x1x1"),
        ("gemm_4bit_wmma16", "2x1x1"),
        ("gemm_4bit_wmma32", "2x1x1"),
        ("gemm_4bit_wmma64", "2x1x1"),
        ("gemm_4bit_wmma64", "2x2x1"),
        ("int8_linear_four_float16", "8x1x1"),
        ("int8_linear_wmma_few_float16", "2x1x1"),
        ("int8_linear_wmma_many_float16", "2x1x1"),
        ("int8_linear_any_float16", "4x1x1"),
    ]


@with_tensor_cores
def test_scratch_holds_the_sums_of_every_part(run_with_driver):
    code = "print(*(_native.gemm_4bit_scratch(0, 2, M, 256, 4096, 64, False, path) for M, path in "
    code += "((16, 'few'), (64, 'many64'), (1024, 'many64'))))"
    assert run_with_driver(code, str(max(ARCHITECTURES))).output.split() == ["0", str(4 * 4 * 64 * 256), "0"]


def test_rows_beyond_what_a_grid_holds_take_further_launches(run_with_driver):
    tiles = 65535
    assert launches(run_with_driver, gemm(M=tiles * 32 + 1, K=500, N=1, path="any")) == [
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
