"""What only a CUDA device can show of products: each path against float64, and launches that begin before the last one ends."""

from __future__ import annotations

from typing import Callable, List, Optional

import bnb_cuda_jetson
import pytest
import torch
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import DTYPES, address, current_stream, nested_addresses

from bnb_core import ops
from bnb_core.quantization.codebooks import get_codebook

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and bnb_cuda_jetson.backend.available()), reason="needs a CUDA device that there is code for"
)

BLOCKSIZE = 64
#: The largest relative error of rounding to a dtype.
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Weight:
    """A 4-bit weight of random codes and scales."""

    def __init__(self, N: int, K: int, blocksize: int = BLOCKSIZE, nested: bool = False) -> None:
        self.N, self.K, self.blocksize = N, K, blocksize
        self.codebook = get_codebook("nf4", "cuda")
        self.packed = torch.randint(0, 256, (N * K // 2,), device="cuda", dtype=torch.uint8)
        self.absmax = (torch.rand(-(-N * K // blocksize), device="cuda") + 0.5) * 1.9 / K**0.5  # products are as large as x
        self.nested: Optional[ops.Nested] = None
        if nested:
            dynamic, offset = get_codebook("dynamic", "cuda"), self.absmax.mean()
            self.absmax, scales = ops.quantize_blockwise(self.absmax - offset, dynamic, 256)
            self.nested = ops.Nested(scales, dynamic, offset, 256)

    def dequantized(self) -> torch.Tensor:
        shape = (self.N, self.K)
        dense = ops.dequantize_4bit(self.packed, self.absmax, self.codebook, self.blocksize, shape, torch.float32, self.nested)
        return dense.double()

    def times(self, x: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        return ops.gemm_4bit(x, self.packed, self.absmax, self.codebook, self.blocksize, self.N, self.K, bias, self.nested)

    def paths(self, M: int, dtype: torch.dtype) -> List[str]:
        paths: List[str] = _native.gemm_4bit_paths(*self._product(M, dtype))
        return paths

    def times_by(
        self, path: str, x: torch.Tensor, bias: Optional[torch.Tensor] = None, y: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Multiply by one path. What it does not write is NaN."""
        M, N, K = x.shape[0], self.N, self.K
        y = torch.full((M, N), torch.nan, device="cuda", dtype=x.dtype) if y is None else y
        size = _native.gemm_4bit_scratch(*self._product(M, x.dtype), path)
        scratch = torch.empty(size // 4, device="cuda")
        weight = self.packed.data_ptr(), self.absmax.data_ptr(), self.codebook.data_ptr(), self.blocksize, N, K
        rest = address(bias), *nested_addresses(self.nested), scratch.data_ptr(), path
        _native.gemm_4bit(0, current_stream(0), y.data_ptr(), DTYPES[x.dtype], x.data_ptr(), M, *weight, *rest)
        return y

    def _product(self, M: int, dtype: torch.dtype) -> tuple:
        return 0, DTYPES[dtype], M, self.N, self.K, self.blocksize, self.nested is not None


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "blocksize"),
    [(1, 64, 64), (1048, 2048, 64), (200, 4160, 64), (77, 320, 128), (4104, 1024, 4096), (16, 8192, 64), (333, 96, 32)],
)
def test_each_path_of_a_product(N, K, blocksize, dtype, nested):
    weight, unit = Weight(N, K, blocksize, nested), UNITS[dtype]
    dense = weight.dequantized()
    bias = torch.randn(N, device="cuda", dtype=dtype)
    for M in (1, 2, 4, 7, 16, 17, 33, 64, 100, 129, 300):
        x = torch.randn(M, K, device="cuda", dtype=dtype)
        exact, total = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
        for path in weight.paths(M, dtype):
            for added in (None, bias):
                expected = exact if added is None else exact + added.double()
                bound = unit * expected.abs() + (unit + 2.0**-24 * K) * total
                error = (weight.times_by(path, x, added).double() - expected).abs()
                assert (error <= bound).all(), (path, M, added is not None)


@pytest.mark.skipif(torch.cuda.is_available() and _native.device(0).architecture < 80, reason="needs tensor cores of sm_80")
def test_each_path_was_among_these():
    names = {path for M in (1, 64) for path in Weight(128, 64).paths(M, torch.float16)}
    assert names == {"any", "one", "few", "wmma", "many32", "many64", "many128"}


@pytest.mark.parametrize("K", [16, 48, 1040, 4096])
@pytest.mark.parametrize("N", [1, 100, 300])
def test_each_path_of_an_int8_product(N, K):
    """Sums are exact, and what is made of them does not depend on the path."""
    codes, absmax = torch.randint(-128, 128, (N, K), device="cuda", dtype=torch.int8), torch.rand(N, device="cuda") + 0.5
    bias = torch.randn(N, device="cuda", dtype=torch.float16)
    for M in (1, 5, 16, 17, 64, 100, 200):
        a = torch.randint(-128, 128, (M, K), device="cuda", dtype=torch.int8)
        for path in _native.int8_paths(0, False, M, K):
            y = torch.empty(M, N, device="cuda", dtype=torch.int32)
            _native.int8_matmul(0, current_stream(0), y.data_ptr(), a.data_ptr(), codes.data_ptr(), M, N, K, path)
            assert torch.equal(y.double(), a.double() @ codes.double().t()), (path, M)
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        x[:, ::37] *= 8
        scratch = torch.empty(_native.int8_linear_scratch(M, K), device="cuda", dtype=torch.uint8)
        weight = codes.data_ptr(), absmax.data_ptr(), bias.data_ptr()
        for threshold in (0.0, 6.0):
            results = {}
            for path in _native.int8_paths(0, True, M, K):
                y = torch.full((M, N), torch.nan, device="cuda", dtype=x.dtype)
                rest = threshold, M, N, K, scratch.data_ptr(), path
                _native.int8_linear(0, current_stream(0), y.data_ptr(), DTYPES[x.dtype], x.data_ptr(), *weight, *rest)
                results[path] = y
            assert torch.isfinite(results["any"]).all()
            for path in set(results) - {"few"}:  # which adds the outliers up in another order
                assert torch.equal(results[path], results["any"]), (path, M, threshold)


def test_each_path_of_int8_was_among_these():
    names = {path for is_linear in (False, True) for path in _native.int8_paths(0, is_linear, 1, 64)}
    assert names >= {"few", "wmma", "any"}


# --------------------------------------------------------------------------------------- launches before the last one has ended


def captured(calls: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what calls give when they are replayed one right after the other."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = calls()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    return result


def assert_waits_change_nothing(calls: Callable[[Callable[[], None]], torch.Tensor]) -> None:
    """Compare calls that wait for the device at each step with the same calls without, and in a graph.

    Args:
        calls: makes the calls, with what to call between two.
    """
    expected = calls(torch.cuda.synchronize)
    assert expected.float().std() > 1e-3
    for _ in range(20):
        assert torch.equal(calls(lambda: None), expected)
    assert torch.equal(captured(lambda: calls(lambda: None)), expected)


@pytest.mark.parametrize("M", [1, 8, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chain_of_products_is_the_products_one_by_one(M, dtype):
    """Each reads what the last one has just written, into memory that the one before that has read."""
    shapes = [(4096, 2048), (2048, 4096), (1024, 2048), (2048, 1024), (320, 2048), (2048, 320)] * 3
    weights = [Weight(N, K, nested=number % 2 > 0) for number, (N, K) in enumerate(shapes)]
    start = torch.randn(M, 2048, device="cuda", dtype=dtype)
    buffers = [torch.empty(M * 4096, device="cuda", dtype=dtype) for _ in range(2)]

    def chain(step: Callable[[], None]) -> torch.Tensor:
        x = start
        for number, weight in enumerate(weights):
            y = buffers[number % 2][: M * weight.N].view(M, weight.N)
            paths = weight.paths(M, dtype)
            x = weight.times_by(paths[1] if M <= 8 else paths[-1], x, y=y)
            step()
        return x.clone()

    assert_waits_change_nothing(chain)


@pytest.mark.parametrize("M", [1, 8, 64])
def test_a_product_sees_what_any_kernel_or_copy_before_it_wrote(M):
    """Of x, codes and scales: by torch's kernels, by copies, by our own, and on another stream."""
    weights = [Weight(4096, 2048) for _ in range(3)]
    target = Weight(4096, 2048)
    inputs = [torch.randn(M, 2048, device="cuda", dtype=torch.bfloat16) for _ in weights]
    dense = [torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16) for _ in weights]
    x = torch.empty_like(inputs[0])

    def calls(step: Callable[[], None]) -> torch.Tensor:
        results = []
        for weight, given, wide in zip(weights, inputs, dense):
            x.copy_(given)
            target.packed.copy_(weight.packed)
            target.absmax.copy_(weight.absmax)
            step()
            results.append(target.times(x))
            step()
            x.mul_(-2)
            results.append(target.times(x))
            step()
            packed, absmax = ops.quantize_4bit(wide, target.codebook, BLOCKSIZE)
            results.append(ops.gemm_4bit(x, packed, absmax, target.codebook, BLOCKSIZE, 4096, 2048))
            step()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                target.packed.bitwise_not_()
            torch.cuda.current_stream().wait_stream(side)
            results.append(target.times(x))
            step()
        return torch.stack(results)

    assert_waits_change_nothing(calls)


@pytest.mark.parametrize("M", [1, 8, 64])
def test_what_follows_a_product_waits_for_it(M):
    """Kernels of torch and of ours, and copies, read its result and write over its operands."""
    weight, other = Weight(4096, 2048), Weight(2048, 4096)
    given, dynamic = torch.randn(M, 2048, device="cuda", dtype=torch.bfloat16), get_codebook("dynamic", "cuda")

    def calls(step: Callable[[], None]) -> torch.Tensor:
        x, results = given.clone(), []
        for _ in range(4):
            y = weight.times(x)
            step()
            x.zero_()
            step()
            x += other.times(y.relu_())
            step()
            codes, absmax = ops.quantize_blockwise(y, dynamic, 256)
            results += [y.clone(), ops.dequantize_blockwise(codes, absmax, dynamic, 256, y.dtype)]
            step()
        return torch.stack(results)

    assert_waits_change_nothing(calls)
