"""A whole decoder layer with quantized projections as one graph: forward and backward, any length, values as in eager calls."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

import bnb_core as bnb
from bnb_core.ops.plain import REGISTERED

pytestmark = [
    pytest.mark.skipif(not REGISTERED, reason="this torch has no torch.ops.bnb to trace"),
    # torch's own tracer of autograd functions.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

WIDTH, HEADS, INNER = 64, 4, 96
FORMATS = {
    "nf4": {"to": "nf4", "double_quant": False},
    "nf4-nested": {"to": "nf4"},
    "nf4-bfloat16": {"to": "nf4", "compute_dtype": torch.bfloat16},
    "int8": {"to": "int8", "threshold": 0.0},
    # As many columns of the normalized input reach 2 as reach 6 in a large model.
    "int8-threshold": {"to": "int8", "threshold": 2.0},
}


class RMSNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x, positions):
    """Rotary position embedding (arXiv 2104.09864) of [batch, heads, length, size]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class DecoderLayer(torch.nn.Module):
    """What Llama is made of (arXiv 2302.13971)."""

    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = RMSNorm(), RMSNorm()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (torch.nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(INNER, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        normed = self.before_attention(x)
        q, k, v = (layer(normed).view(batch, length, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        positions = torch.arange(length, device=x.device, dtype=x.dtype)
        mixed = F.scaled_dot_product_attention(rotated(q, positions), rotated(k, positions), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class LlamaLayer(torch.nn.Module):
    """The layer of transformers, with the rotary embedding that its model computes once for all layers."""

    def __init__(self):
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=2, attn_implementation="sdpa"
        )
        self.rotary, self.layer = LlamaRotaryEmbedding(config), LlamaDecoderLayer(config, 0)

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device)[None]
        y = self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))
        return y[0] if isinstance(y, tuple) else y


LAYERS = {
    "own": DecoderLayer,
    "transformers": pytest.param(
        LlamaLayer,
        marks=pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    ),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return request.param().eval()


every = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def quantized(layer, form):
    report = bnb.quantize_model(layer, **form)
    assert len(report.layers) == 7
    return layer


def run(layer, x):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return [y, x.grad, *(parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None)]


def compiled(layer, **options):
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, **options)


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every
def test_forward_and_backward(layer, form):
    quantized(layer, form)
    x = torch.randn(2, 7, WIDTH)
    assert_equal(run(compiled(layer, backend="aot_eager"), x), run(layer, x))


@pytest.mark.parametrize("form", ["nf4-nested", "int8-threshold"])
def test_any_length_by_one_graph(layer, form):
    quantized(layer, FORMATS[form])
    fast = compiled(layer, backend="aot_eager", dynamic=True)
    run(fast, torch.randn(2, 7, WIDTH))
    with torch.compiler.set_stance("fail_on_recompile") if hasattr(torch.compiler, "set_stance") else torch.enable_grad():
        for shape in ((2, 9), (3, 33), (2, 64)):
            x = torch.randn(*shape, WIDTH)
            assert_equal(run(fast, x), run(layer, x))


@every
def test_between_eager_calls(form):
    """What eager calls keep of the last one is nothing that a graph depends on."""
    layer = quantized(DecoderLayer().eval(), form)
    fast = compiled(layer, backend="aot_eager")
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        assert_equal([fast(x), layer(x)], [expected, expected])
        with torch.compiler.set_stance("fail_on_recompile") if hasattr(torch.compiler, "set_stance") else torch.no_grad():
            assert_equal([fast(x), layer(x)], [expected, expected])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from what the compiler imports
def test_default_compiler():
    """Which generates code in place of what it has traced, and rounds otherwise."""
    layer = quantized(DecoderLayer().eval(), FORMATS["nf4-nested"])
    x = torch.randn(2, 7, WIDTH)
    for actual, expected in zip(run(compiled(layer), x), run(layer, x)):
        assert (actual - expected).norm() < 1e-3 * expected.norm()
