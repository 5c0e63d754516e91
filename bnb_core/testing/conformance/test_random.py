"""Arguments that nobody thought of, and, when one of them fails, the simplest like it."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnb_core.testing import cases, strategies
from bnb_core.testing.subject import KernelUnderTest, for_ops

_settings = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@for_ops("quantize_4bit", "quantize_blockwise")
@_settings
@given(data=st.data())
def test_random_blocks(bnb_kernel: KernelUnderTest, data: st.DataObject) -> None:
    entries = 16 if bnb_kernel.spec.name == "quantize_4bit" else 256
    bnb_kernel.verify(*data.draw(strategies.quantize_arguments(bnb_kernel.dtype, entries)))


@for_ops("dequantize_4bit")
@_settings
@given(data=st.data())
def test_random_dequantize_4bit(bnb_kernel: KernelUnderTest, data: st.DataObject) -> None:
    N, K, blocksize, nested_blocksize = data.draw(strategies.weight_shapes())
    weight = cases.weight_4bit(N * K, blocksize, "unsorted", nested_blocksize)
    bnb_kernel.verify(*weight.quantized, (N, K), bnb_kernel.dtype, weight.nested)


@for_ops("gemm_4bit", "gemm_4bit_transposed")
@_settings
@given(data=st.data())
def test_random_products(bnb_kernel: KernelUnderTest, data: st.DataObject) -> None:
    N, K, blocksize, nested_blocksize = data.draw(strategies.weight_shapes())
    weight = cases.weight_4bit(N * K, blocksize, "nf4", nested_blocksize)
    forward = bnb_kernel.spec.name == "gemm_4bit"
    x = cases.activations("normal", (data.draw(st.integers(0, 40)), K if forward else N), bnb_kernel.dtype)
    bias = [cases.bias(N, bnb_kernel.dtype) if data.draw(st.booleans()) else None] if forward else []
    bnb_kernel.verify(x, *weight.quantized, N, K, *bias, weight.nested)


@for_ops("int8_quantize_rows", "int8_quantize_rows_cols")
@_settings
@given(data=st.data())
def test_random_rows(bnb_kernel: KernelUnderTest, data: st.DataObject) -> None:
    bnb_kernel.verify(data.draw(strategies.rows(bnb_kernel.dtype)), data.draw(st.sampled_from([0.0, 6.0, 0.5])))
