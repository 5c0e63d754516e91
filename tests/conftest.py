"""Fixtures for tests of the ops."""

import functools

import pytest
import torch

from bnb_core.backends import ANY_DEVICE, Backend, get_backend, register
from bnb_core.ops import Hyperparameters, Nested
from bnb_core.ops.spec import OPS

N, K, TOKENS, EXPERTS, BLOCKSIZE = 6, 35, 4, 3, 32


def _uniform(*shape, low=0.1, high=1.0):
    return torch.empty(*shape).uniform_(low, high)


def _bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _scales(shape, nested):
    """Block scales as `gemm_4bit` and its like take them, and the statistics that they are quantized with, if they are."""
    if not nested:
        return _uniform(*shape), None
    count = -(-torch.Size(shape).numel() // 4)
    return _bytes(*shape), Nested(_uniform(count), _uniform(256), torch.tensor(0.05), 4)


def _make(op, dtype, nested):
    blocks = -(-N * K // BLOCKSIZE)
    codebook4, codebook8 = torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256)
    absmax, statistics = _scales((blocks,), nested)
    values = {
        "x": torch.randn(2, TOKENS, K).to(dtype),
        "g": torch.randn(2, TOKENS, N).to(dtype),
        "packed": _bytes((N * K + 1) // 2),
        "absmax": absmax,
        "codebook": codebook4,
        "blocksize": BLOCKSIZE,
        "shape": torch.Size((N, K)),
        "dtype": dtype,
        "nested": statistics,
        "N": N,
        "K": K,
        "bias": torch.randn(N).to(dtype),
        "num_embeddings": N,
        "embedding_dim": K,
        "indices": torch.randint(0, N, (2, TOKENS)),
        "threshold": 1.5,
        "offsets": torch.tensor([0, 1, 1, TOKENS], dtype=torch.int32),
    }
    if "blockwise" in op:
        values.update(codebook=codebook8, codes=_bytes(N, K))
    if op.startswith("grouped"):
        values["absmax"], values["nested"] = _scales((EXPERTS, blocks), nested)
        values["packed"] = _bytes(EXPERTS, (N * K + 1) // 2)
        values.update(x=values["x"][0], g=values["g"][0])
    if op.startswith("int8") or op == "embedding_8bit":
        values["codes"] = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        values["absmax"] = _uniform(N)
        values["product"] = torch.randint(-9999, 9999, (TOKENS, N), dtype=torch.int32)
        values.update(row_absmax=_uniform(TOKENS), col_absmax=_uniform(N))
        values["a"] = torch.randint(-127, 128, (TOKENS, K), dtype=torch.int8)
        values["b"] = values["codes"]
    if op.startswith("int8_quantize"):
        values["x"] = values["x"][0]
    if op.startswith("optimizer"):
        values.update(_optimizer_values(op, dtype, codebook8))
    return tuple(values[parameter.name] for parameter in OPS[op].parameters)


def _optimizer_values(op, dtype, codebook):
    shapes = [(N, K), (7,)]
    blockwise = "8bit" in op

    def states():
        return [_bytes(*shape) if blockwise else _uniform(*shape) for shape in shapes]

    def scales():
        return [_uniform(-(-torch.Size(shape).numel() // BLOCKSIZE)) for shape in shapes]

    return {
        "params": [torch.randn(shape).to(dtype) for shape in shapes],
        "grads": [torch.randn(shape).to(dtype) for shape in shapes],
        "state1": states(),
        "state2": states(),
        "state3": [],
        "absmax1": scales(),
        "absmax2": scales(),
        "absmax3": [],
        "codebook1": codebook,
        "codebook2": codebook.abs(),
        "codebook3": None,
        "algorithm": "adam",
        "hyperparameters": Hyperparameters(beta1=0.9, beta2=0.999, eps=1e-8),
        "step": 1,
        "lr": 1e-2,
    }


@pytest.fixture
def example_call():
    """Make the arguments of a small call of an op, in the spec's order: `example_call(op, dtype, nested=False, **replacements)`."""

    def make(op, dtype=torch.float32, nested=False, **replacements):
        args = dict(zip((parameter.name for parameter in OPS[op].parameters), _make(op, dtype, nested)))
        assert not set(replacements) - set(args), f"{op} has no {replacements}"
        args.update(replacements)
        return tuple(args.values())

    return make


def _groups(n, size):
    return torch.tensor([i // size for i in range(n)], dtype=torch.int64)


@pytest.fixture
def dequantized():
    """Compute the float64 values of a 4-bit tensor, from the definition: `dequantized(packed, absmax, codebook, blocksize, n)`."""

    def compute(packed, absmax, codebook, blocksize, n, nested=None):
        packed = packed.reshape(-1)
        codes = torch.stack((packed >> 4, packed & 15), 1).reshape(-1)[:n].long()
        scales = absmax.reshape(-1)
        if nested is not None:
            groups = _groups(scales.numel(), nested.blocksize)
            scales = nested.codebook[scales.long()] * nested.absmax[groups] + nested.offset
        return codebook.double()[codes] * scales.double()[_groups(n, blocksize)]

    return compute


@pytest.fixture
def register_recorder():
    """Register a backend that runs the reference's kernels: `register_recorder(name, factor=1)`.

    It lists the ops that it ran in `ran`, and what they were to fill in `outs`. An output that is floating-point is multiplied by
    `factor`. It is only used where it is asked for.
    """

    def make(name, factor=1):
        backend = Backend(name, api_version=(1, 0), priority=-1)
        backend.ran, backend.outs = [], []
        for op, kernel in get_backend("reference").kernels.items():
            dtypes = [getattr(torch, dtype) for dtype in kernel.dtypes]
            backend.kernel(op, devices={ANY_DEVICE}, dtypes=dtypes)(_recorded(backend, op, kernel.function, factor))
        register(backend)
        return backend

    return make


def _recorded(backend, op, function, factor):
    @functools.wraps(function)
    def run(*args, **keywords):
        out = keywords.get("out")
        backend.ran.append(op)
        backend.outs.append(out)
        function(*args, **keywords)
        if factor != 1 and isinstance(out, torch.Tensor) and out.is_floating_point():
            out.mul_(factor)

    return run
