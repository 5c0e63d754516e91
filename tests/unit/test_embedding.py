"""Embedding and StableEmbedding: their values, gradients, and the 32-bit optimizer states."""

import copy
import pickle

import pytest
import torch

from bnb_core import optim
from bnb_core.nn import Embedding, StableEmbedding
from bnb_core.optim import GlobalOptimManager

both = pytest.mark.parametrize("kind", [Embedding, StableEmbedding])


@pytest.fixture(autouse=True)
def _no_overrides():
    GlobalOptimManager.get_instance().initialize()
    yield
    GlobalOptimManager.get_instance().initialize()


def state_dtype(module):
    """The dtype of a state that an 8-bit optimizer makes for the module's table."""
    optimizer = optim.Adam8bit(module.parameters(), min_8bit_size=0)
    module(torch.arange(4)).sum().backward()
    optimizer.step()
    return optimizer.state[module.weight]["state1"].dtype


@both
def test_optimizer_states_are_32_bit(kind):
    assert state_dtype(kind(64, 64)) == torch.float32
    assert state_dtype(torch.nn.Embedding(64, 64)) == torch.uint8


@both
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_optimizer_states_of_copies_are_32_bit(kind, copied):
    assert state_dtype(copied(kind(64, 64))) == torch.float32


@both
def test_initial_values_are_xavier_uniform_with_a_zero_row_for_padding(kind):
    module = kind(300, 100, padding_idx=7)
    bound = (6 / (300 + 100)) ** 0.5
    assert module.weight[7].eq(0).all()
    assert 0.99 * bound < module.weight.abs().max() <= bound
    assert abs(module.weight.std() - bound / 3**0.5) < 0.01 * bound


@both
def test_padding_has_no_gradient(kind):
    module = kind(10, 8, padding_idx=3)
    module(torch.tensor([3, 4])).square().sum().backward()
    assert module.weight.grad[3].eq(0).all()


def test_embedding_looks_rows_up():
    module = Embedding(10, 8, max_norm=0.5, norm_type=1.0, scale_grad_by_freq=True)
    twin = torch.nn.Embedding(10, 8, max_norm=0.5, norm_type=1.0, scale_grad_by_freq=True, _weight=module.weight.data.clone())
    indices = torch.tensor([[1, 2, 1], [9, 0, 1]])
    g = torch.randn(2, 3, 8)
    for table in (module, twin):
        table(indices).backward(g)
    assert torch.equal(module(indices), twin(indices))
    assert torch.equal(module.weight.grad, twin.weight.grad)
    assert Embedding(10, 8, sparse=True)(indices).sum().backward() is None


def test_a_given_table_is_used():
    values = torch.randn(5, 4)
    for kind in (Embedding, StableEmbedding):
        assert torch.equal(kind(5, 4, _weight=values).weight, values)
    assert StableEmbedding(5, 4, dtype=torch.float16).weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_stable_embedding_normalizes_in_full_precision(dtype):
    module = StableEmbedding(20, 48)
    torch.nn.init.normal_(module.norm.weight)
    torch.nn.init.normal_(module.norm.bias)
    module.to(dtype)
    indices = torch.randint(20, (3, 5))
    y = module(indices)
    rows = module.weight.double()[indices]
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + module.norm.eps).sqrt()
    expected = rows * module.norm.weight.double() + module.norm.bias.double()
    assert y.dtype == dtype
    # Half a unit in the last place of the result, plus what float32 loses.
    bound = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-5 + torch.finfo(dtype).tiny
    assert ((y.double() - expected).abs() <= bound).all()
    y.sum().backward()
    assert module.weight.grad.dtype == dtype
