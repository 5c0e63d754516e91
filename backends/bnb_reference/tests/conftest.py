"""Fixtures for the tests of the reference backend: it runs every op, and can be made to cut tensors into tiny pieces."""

import bnb_reference
import pytest
import torch
from bnb_reference import devices

from bnb_core import backends
from bnb_core.ops import Nested

NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
    + (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)
FP4_MAGNITUDES = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)


@pytest.fixture(autouse=True)
def _reference(_clean_backends):
    backends.register(bnb_reference.backend)  # where the package is on the path without being installed
    backends.set_backend("reference")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    """Run with the usual pieces, which are larger than the tensors of most tests, and with pieces of 64 elements."""
    if request.param == "many pieces":
        monkeypatch.setattr(devices, "CPU_PIECE", 64)


@pytest.fixture
def codebooks():
    """4-bit codebooks by name: sorted, with two zeros, in no order, and with equal entries."""
    generator = torch.Generator().manual_seed(1)
    return {
        "nf4": torch.tensor(NF4),
        "fp4": torch.tensor(FP4_MAGNITUDES + tuple(-value for value in FP4_MAGNITUDES)),
        "shuffled": torch.tensor(NF4)[torch.randperm(16, generator=generator)],
        "repeated": torch.tensor([0.5, -1.0, 0.25, 0.5] * 4),
    }


@pytest.fixture
def nf4(codebooks):
    return codebooks["nf4"]


@pytest.fixture
def dynamic():
    """A codebook of 256 entries that crowd around zero, as those of optimizer states do."""
    positive = torch.logspace(-6, 0, 127, dtype=torch.float64)
    return torch.cat((-positive.flip(0), torch.zeros(2, dtype=torch.float64), positive)).float()


@pytest.fixture
def host_reads_forbidden(monkeypatch):
    """Take the paths that other devices than the CPU take."""
    monkeypatch.setattr(devices, "reads_are_free", lambda device: False)


@pytest.fixture
def calls():
    """Return a function of (device, dtype) that lists a call of each kernel, all options in use: name, arguments, outputs."""

    def calls(device, dtype):
        torch.manual_seed(0)

        def floats(*shape, dtype=torch.float32):
            return torch.randn(shape).to(dtype).to(device)

        def integers(low, high, *shape, dtype=torch.uint8):
            return torch.randint(low, high, shape, dtype=dtype).to(device)

        def outputs(*layouts):
            made = tuple(torch.zeros(shape, dtype=of, device=device) for shape, of in layouts)
            return made if len(made) > 1 else made[0]

        u8, i8, f32 = torch.uint8, torch.int8, torch.float32
        N, K, experts, tokens, blocksize = 30, 66, 3, 8, 32
        n, blocks = N * K, -(-N * K // blocksize)
        x, g, bias = floats(tokens, K, dtype=dtype), floats(tokens, N, dtype=dtype), floats(N, dtype=dtype)
        x[:, 5] *= 20  # an outlier column
        codebook, table = floats(16), floats(256)
        nested = Nested(floats(9).abs(), floats(256), floats(), 7)
        experts_nested = Nested(floats(30).abs(), floats(256), floats(), 7)
        weight = (integers(0, 256, n // 2), integers(0, 256, blocks), codebook, blocksize)
        offsets = torch.tensor([0, 3, 3, tokens], dtype=torch.int32).to(device)
        weights = (integers(0, 256, experts, n // 2), integers(0, 256, experts, blocks), codebook, blocksize, offsets)
        int8_weight = (integers(-127, 128, N, K, dtype=i8), floats(N).abs())
        indices = integers(0, N, 2, 4, dtype=torch.int64)
        row_outputs = ((x.shape, i8), (tokens, f32))
        y, grad = ((tokens, N), dtype), ((tokens, K), dtype)
        x_blocks = -(-x.numel() // 7)
        quantized = (integers(0, 256, *x.shape), floats(x_blocks).abs(), table, 7)
        return [
            ("quantize_blockwise", (x, table, 7), outputs((x.shape, u8), (x_blocks, f32))),
            ("dequantize_blockwise", quantized, outputs(grad)),
            ("quantize_4bit", (x, codebook, blocksize), outputs((x.numel() // 2, u8), (-(-x.numel() // blocksize), f32))),
            ("dequantize_4bit", (*weight, nested), outputs(((N, K), dtype))),
            ("gemm_4bit", (x, *weight, N, K, bias, nested), outputs(y)),
            ("gemm_4bit_transposed", (g, *weight, N, K, nested), outputs(grad)),
            ("grouped_gemm_4bit", (x, *weights, N, K, experts_nested), outputs(y)),
            ("grouped_gemm_4bit_transposed", (g, *weights, N, K, experts_nested), outputs(grad)),
            ("embedding_4bit", (indices, *weight, N, K, nested), outputs(((2, 4, K), dtype))),
            ("embedding_8bit", (indices, *int8_weight), outputs(((2, 4, K), dtype))),
            ("int8_quantize_rows", (x, 6.0), outputs(*row_outputs, (K, torch.bool))),
            ("int8_quantize_rows_cols", (x, 6.0), outputs(*row_outputs, (x.shape, i8), (K, f32), (K, torch.bool))),
            ("int8_matmul", (integers(-128, 128, tokens, K, dtype=i8), int8_weight[0]), outputs(((tokens, N), torch.int32))),
            (
                "int8_matmul_dequant",
                (integers(-9999, 9999, tokens, N, dtype=torch.int32), floats(tokens).abs(), floats(N).abs(), bias),
                outputs(y),
            ),
            ("int8_dequantize_rows", int8_weight, outputs(((N, K), dtype))),
            ("int8_linear", (x, *int8_weight, bias, 6.0), outputs(y)),
            ("int8_linear_transposed", (g, *int8_weight), outputs(grad)),
        ]

    return calls
