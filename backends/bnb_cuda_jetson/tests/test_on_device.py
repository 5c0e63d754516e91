"""What only a CUDA device can show: graphs, sizes beyond 32 bits, streams and threads at once, what becomes of CUDA's errors."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, Tuple

import bnb_cuda_jetson
import pytest
import torch

from bnb_core import nn, ops, optim
from bnb_core.ops.spec import OPS
from bnb_core.ops.structured import structured_op
from bnb_core.quantization.codebooks import get_codebook
from bnb_core.testing.calls import plain_call

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and bnb_cuda_jetson.backend.available()), reason="needs a CUDA device that there is code for"
)

BLOCKSIZE = 64


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def need_memory(size: int) -> None:
    if torch.cuda.mem_get_info()[0] < size * 1.1:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of free memory")


def assert_same(first: Any, second: Any) -> None:
    """Fail unless two results, or two tuples of results, are equal to the bit."""
    for one, other in zip(*(result if isinstance(result, (tuple, list)) else (result,) for result in (first, second))):
        assert torch.equal(one, other)


# --------------------------------------------------------------------------------------------------------------------- graphs


def to_device(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, ops.Nested):
        return ops.Nested(*map(to_device, value))
    return [tensor.cuda() for tensor in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op, spec in OPS.items() for dtype in spec.dtypes])
def test_every_op_can_be_captured(op, dtype):
    args, again = ([to_device(value) for value in plain_call(op, getattr(torch, dtype), 4)] for _ in range(2))
    function = structured_op(op)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*args)
    for _ in range(2):
        graph.replay()
        expected = function(*again)
        for parameter, one, other in zip(OPS[op].parameters, args, again):
            if parameter.mutated:
                assert_same(one, other)
        if captured is not None:
            assert_same(captured, expected)


OPTIMIZERS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "Adam8bit": ("Adam8bit", {}),
    "AdamW8bit, limited": ("AdamW8bit", {"max_unorm": 0.02, "weight_decay": 0.1}),
    "AdEMAMix8bit": ("AdEMAMix8bit", {"t_alpha": 7, "t_beta3": 7}),
    "Lion8bit": ("Lion8bit", {"weight_decay": 0.1}),
    "SGD": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "AdamW": ("AdamW", {"weight_decay": 0.1}),
    "Adagrad": ("Adagrad", {"lr_decay": 0.1}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_replays_of_a_step_are_steps_whatever_the_learning_rate_is_then(name, options, dtype):
    shapes = [(5000,), (64, 128), (3, 7), (1,)] + [(33, 17)] * 45  # more than one launch takes
    params: List[List[torch.nn.Parameter]] = [[], []]
    for shape in shapes:
        value, grad = torch.randn(shape, device="cuda", dtype=dtype), torch.randn(shape, device="cuda", dtype=dtype)
        for each in params:
            each.append(torch.nn.Parameter(value.clone()))
            each[-1].grad = grad.clone()
    captured, eager = (getattr(optim, name)([{"params": each, **options}], lr=1e-2, capturable=True) for each in params)
    for optimizer in (captured, eager):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for i in range(10):
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (i + 1))
        for one, other in zip(*params):
            one.grad.normal_()
            other.grad.copy_(one.grad)
        graph.replay()
        eager.step()
    for one, other in zip(*params):
        assert torch.equal(one, other)
        for key, value in captured.state[one].items():
            assert torch.equal(value, eager.state[other][key]), key
    assert int(captured.state[params[0][0]]["step"]) == 11


def test_a_captured_model_is_the_model():
    torch.manual_seed(0)
    layers = [
        nn.LinearNF4(256, 512, compute_dtype=torch.bfloat16),
        nn.Linear8bitLt(512, 128, has_fp16_weights=False, threshold=6.0),
    ]
    model = torch.nn.Sequential(*layers).to(torch.bfloat16).cuda()
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(captured, model(x))


# ---------------------------------------------------------------------------------------------------------- more than 32 bits

#: Elements, not a multiple of any blocksize, and where to look: the start, both sides of 2^31, and the end; all starts of blocks.
MANY = (1 << 31) + (1 << 20) + 77
PLACES = (0, (1 << 31) - (1 << 16), 1 << 31, (1 << 31) + (1 << 20) - 4096)
PART = 1 << 16


@pytest.fixture
def many():
    """A tensor of more than 2^31 elements."""
    need_memory(9 * MANY)
    x = torch.empty(MANY, device="cuda", dtype=torch.bfloat16)
    for start in range(0, MANY, 1 << 28):
        x[start : start + (1 << 28)].normal_()
    return x


def test_quantize_4bit_of_a_huge_tensor(many):
    nf4 = get_codebook("nf4", "cuda")
    packed, absmax = ops.quantize_4bit(many, nf4, BLOCKSIZE)
    result = ops.dequantize_4bit(packed, absmax, nf4, BLOCKSIZE, many.shape, many.dtype)
    for start in PLACES:
        part = many[start : start + PART]
        some, scales = ops.quantize_4bit(part, nf4, BLOCKSIZE)
        assert torch.equal(packed[start // 2 :][: some.numel()], some)
        assert torch.equal(absmax[start // BLOCKSIZE :][: scales.numel()], scales)
        expected = ops.dequantize_4bit(some, scales, nf4, BLOCKSIZE, part.shape, part.dtype)
        assert torch.equal(result[start : start + PART], expected)


@pytest.mark.parametrize("blocksize", [64, 100])
def test_quantize_blockwise_of_a_huge_tensor(many, blocksize):
    codebook = get_codebook("dynamic", "cuda")
    codes, absmax = ops.quantize_blockwise(many, codebook, blocksize)
    result = ops.dequantize_blockwise(codes, absmax, codebook, blocksize, many.dtype)
    for start in PLACES:
        start = start // blocksize * blocksize
        part = many[start : start + PART // blocksize * blocksize]
        some, scales = ops.quantize_blockwise(part, codebook, blocksize)
        assert torch.equal(codes[start:][: some.numel()], some)
        assert torch.equal(absmax[start // blocksize :][: scales.numel()], scales)
        expected = ops.dequantize_blockwise(some, scales, codebook, blocksize, part.dtype)
        assert torch.equal(result[start:][: part.numel()], expected)


@pytest.mark.parametrize("M", [1, 8, 40, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_with_a_huge_weight(M, dtype):
    N, K = (1 << 19) + 72, 4096
    need_memory(N * K)
    nf4 = get_codebook("nf4", "cuda")
    packed = torch.randint(0, 256, (N * K // 2,), device="cuda", dtype=torch.uint8)
    absmax = torch.rand(N * K // BLOCKSIZE, device="cuda") + 0.5
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    y = ops.gemm_4bit(x, packed, absmax, nf4, BLOCKSIZE, N, K)
    for row in (0, (1 << 19) - 8, N - 64):
        rows = slice(row * K // BLOCKSIZE, (row + 64) * K // BLOCKSIZE)
        codes = packed[row * K // 2 : (row + 64) * K // 2]
        weight = ops.dequantize_4bit(codes, absmax[rows], nf4, BLOCKSIZE, (64, K), torch.float32).double()
        expected, found = x.double() @ weight.t(), y[:, row : row + 64].double()
        unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
        bound = unit * expected.abs() + (unit + 2.0**-24 * K) * (x.double().abs() @ weight.abs().t())
        assert ((found - expected).abs() <= bound).all()


def test_int8_linear_with_a_huge_weight():
    N, K = (1 << 19) + 72, 4096
    need_memory(2 * N * K)
    codes = torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8)
    absmax = torch.rand(N, device="cuda") + 0.5
    x = torch.randn(8, K, device="cuda", dtype=torch.float16)
    y = ops.int8_linear(x, codes, absmax, None, 0.0)
    for row in (0, (1 << 19) - 8, N - 64):
        assert torch.equal(y[:, row : row + 64], ops.int8_linear(x, codes[row : row + 64], absmax[row : row + 64], None, 0.0))


def test_optimizer_step_of_a_huge_parameter(many):
    need_memory(9 * MANY)
    param = torch.nn.Parameter(many)
    starts = [start // 256 * 256 for start in PLACES]
    parts = [torch.nn.Parameter(many[start : start + PART].clone()) for start in starts]
    param.grad = torch.empty_like(many)
    for start in range(0, MANY, 1 << 28):
        param.grad[start : start + (1 << 28)].normal_()
    for part, start in zip(parts, starts):
        part.grad = param.grad[start : start + PART].clone()
    for optimizer in (optim.AdamW8bit([param], lr=1e-2), optim.AdamW8bit(parts, lr=1e-2)):
        optimizer.step()
        optimizer.step()
    for part, start in zip(parts, starts):
        assert torch.equal(param.detach()[start : start + PART], part.detach())


# --------------------------------------------------------------------------------------------------- streams, threads, devices


def work(seed: int, repeats: int) -> List[torch.Tensor]:
    """Quantize, multiply and take optimizer steps, on torch's current stream."""
    generator = torch.Generator("cuda").manual_seed(seed)
    results = []
    for _ in range(repeats):
        weight = torch.randn(512, 1024, device="cuda", generator=generator).to(torch.bfloat16)
        x = torch.randn(4 + seed, 1024, device="cuda", generator=generator).to(torch.bfloat16)
        packed, state = quantized(weight)
        param = torch.nn.Parameter(weight.clone())
        param.grad = weight * 0.5
        optimizer = optim.AdamW8bit([param], lr=1e-2)
        for _ in range(3):
            optimizer.step()
        y = ops.gemm_4bit(x, packed, *state, 512, 1024)
        threshold = ops.int8_linear(x.half(), *int8_weight(weight), None, 2.0)
        results += [packed, y, param.detach(), threshold]
    return results


def quantized(weight: torch.Tensor) -> Tuple[torch.Tensor, Tuple[torch.Tensor, torch.Tensor, int]]:
    nf4 = get_codebook("nf4", "cuda")
    packed, absmax = ops.quantize_4bit(weight, nf4, BLOCKSIZE)
    return packed, (absmax, nf4, BLOCKSIZE)


def int8_weight(weight: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    codes, absmax, _ = ops.int8_quantize_rows(weight, 0.0)
    return codes, absmax


def on_its_own_stream(seed: int) -> List[torch.Tensor]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = work(seed, 20)
    stream.synchronize()
    return results


def test_two_threads_with_a_stream_each():
    expected = [work(seed, 20) for seed in (1, 2)]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(on_its_own_stream, (1, 2)))
    for results, wanted in zip(found, expected):
        assert_same(results, wanted)


def test_two_streams_of_one_thread():
    expected = [work(seed, 5) for seed in (1, 2)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for seed, stream in zip((1, 2), streams):
        with torch.cuda.stream(stream):
            found.append(work(seed, 5))
    torch.cuda.synchronize()
    for results, wanted in zip(found, expected):
        assert_same(results, wanted)


def test_a_thread_that_has_used_no_cuda_yet_has_the_context_for_the_call():
    x = torch.randn(64, 64, device="cuda")
    nf4 = get_codebook("nf4", "cuda")
    with ThreadPoolExecutor(1) as pool:
        packed, absmax = pool.submit(ops.quantize_4bit, x, nf4, BLOCKSIZE).result()
    assert_same((packed, absmax), ops.quantize_4bit(x, nf4, BLOCKSIZE))


# --------------------------------------------------------------------------------------------------------------------- errors


def run_apart(code: str) -> str:
    """Run code in a process of its own: an error like these is the end of the process' context."""
    program = "import torch, bnb_cuda_jetson\nfrom bnb_cuda_jetson import _native\ntorch.zeros(1, device='cuda')\n" + code
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


#: Of memory that is nobody's.
DEQUANTIZE = "_native.dequantize_4bit(0, 0, 256, 1, 4096, 256, 256, 256, 64, 0, 0, 0, 1)\n"


def caught(code: str) -> str:
    return (
        f"try:\n    {code}except bnb_cuda_jetson.CudaError as error:\n    print('CudaError', error)\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )


def test_an_illegal_address_is_an_error_that_names_op_device_and_cause():
    output = run_apart(DEQUANTIZE + caught("torch.cuda.synchronize()\n") + caught(DEQUANTIZE)).splitlines()
    assert output[-1].startswith(f"CudaError dequantize_4bit failed on cuda:0 ({torch.cuda.get_device_name(0)}): CUDA_ERROR_")
    assert output[-1].endswith("an illegal memory access was encountered")
