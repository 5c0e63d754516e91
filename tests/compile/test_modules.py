"""Embeddings, experts and parametrized parameters under torch.compile: one graph, the same values and gradients."""

import pytest
import torch

from bnb_core import nn
from bnb_core.nn.parametrize import replace_parameter_4bit
from bnb_core.ops.plain import REGISTERED

pytestmark = pytest.mark.skipif(not REGISTERED, reason="torch.compile needs registered ops")


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()


def compiled(module):
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("make", [nn.EmbeddingNF4, nn.EmbeddingFP4, nn.Embedding8bit])
def test_embeddings(make):
    module = make(20, 48).to("cpu")
    fast = compiled(module)
    for indices in (torch.tensor([[3, 4, 3]]), torch.tensor([[0, 19, 7, 7]])):
        assert torch.equal(fast(indices), module(indices))


def test_experts():
    module = nn.Experts4bit(4, 16, 32).to("cpu")
    x, weights = torch.randn(6, 16, requires_grad=True), torch.rand(6, 2)
    experts = torch.rand(6, 4).topk(2).indices
    y, expected = compiled(module.mix)(x, experts, weights), module.mix(x, experts, weights)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(result, x, g)[0] for result in (y, expected)))


@pytest.mark.parametrize(("kind", "size"), [(torch.nn.Conv1d, (9,)), (torch.nn.Conv2d, (5, 6)), (torch.nn.Conv3d, (4, 5, 4))])
def test_parametrized_convolutions(kind, size):
    module = kind(4, 6, 3)
    replace_parameter_4bit(module, "weight", compress_statistics=True)
    x = torch.randn(2, 4, *size, requires_grad=True)
    y, expected = compiled(module)(x), module(x)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(result, x, g)[0] for result in (y, expected)))
    (found,) = (item for item in module.parametrizations["weight"])
    assert not found._kept
    assert not found._forwards
