"""Experts4bit and Routing: products, gradients, orders of tokens, checkpoints."""

import copy
import pickle

import pytest
import torch

from bnb_core import functional
from bnb_core.errors import InvalidArgumentError, NotQuantizedError
from bnb_core.nn import Experts4bit, Routing
from bnb_core.nn.parametrize import replace_parameter_4bit
from bnb_core.testing import oracle
from bnb_core.testing.tolerances import as_numpy, assert_product

EXPERTS, IN, OUT = 5, 24, 16
SETTINGS = [("nf4", False, torch.uint8), ("nf4", True, torch.uint8), ("fp4", True, torch.bfloat16), ("fp4", False, torch.float32)]
settings = pytest.mark.parametrize(("quant_type", "nested", "storage"), SETTINGS, ids=str)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(quant_type="nf4", nested=True, storage=torch.uint8, **kwargs):
    return Experts4bit(EXPERTS, IN, OUT, compress_statistics=nested, quant_type=quant_type, quant_storage=storage, **kwargs).to(
        "cpu"
    )


def weights_of(module):
    """float32 [E, N, K]."""
    return functional.dequantize_4bit(module.weight.data, module.quant_state)


def spread(counts):
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------------------------- products


@settings
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(3, 0, 1, 7, 2), (0, 0, 0, 0, 4), (0, 0, 0, 0, 0)], ids=str)
def test_each_row_is_multiplied_by_its_expert(quant_type, nested, storage, dtype, counts):
    module = make(quant_type, nested, storage)
    offsets, weights = spread(counts), weights_of(module)
    x = torch.randn(sum(counts), IN).to(dtype).requires_grad_()
    g = torch.randn(sum(counts), OUT).to(dtype)
    y = module(x, offsets)
    y.backward(g)
    assert y.dtype == x.grad.dtype == dtype
    for expert in range(EXPERTS):
        rows = slice(offsets[expert], offsets[expert + 1])
        if counts[expert]:
            weight = as_numpy(weights[expert])
            assert_product(y[rows], oracle.product(as_numpy(x[rows]), weight), f"y of expert {expert}")
            assert_product(x.grad[rows], oracle.product(as_numpy(g[rows]), weight.T), f"the gradient of expert {expert}")
    assert module.weight.grad is None


def test_compute_dtype():
    module = make(compute_dtype=torch.bfloat16)
    x, offsets = torch.randn(4, IN), spread((1, 1, 1, 1, 0))
    y = module(x, offsets)
    assert y.dtype == torch.float32
    assert torch.equal(y, module(x.bfloat16(), offsets).float())


def test_values_start_as_in_linear():
    module = Experts4bit(EXPERTS, IN, OUT)
    assert module.weight.shape == (EXPERTS, OUT, IN)
    assert 0.98 * IN**-0.5 < module.weight.abs().max() <= IN**-0.5


# -------------------------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mix_is_the_weighted_sum(top_k, dtype):
    module = make()
    x = torch.randn(3, 7, IN, requires_grad=True)
    experts = torch.rand(3, 7, EXPERTS).topk(top_k).indices.to(dtype)
    weights = torch.rand(3, 7, top_k, requires_grad=True)
    y = module.mix(x, experts, weights)
    expected = torch.einsum("...k,...kni,...i->...n", weights, weights_of(module)[experts.long()], x)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, (x, weights), g), torch.autograd.grad(expected, (x, weights), g)):
        torch.testing.assert_close(ours, theirs)


def test_one_routing_for_two_layers():
    up, down = Experts4bit(EXPERTS, IN, 32).to("cpu"), Experts4bit(EXPERTS, 32, IN).to("cpu")
    x = torch.randn(9, IN)
    experts, weights = torch.randint(EXPERTS, (9, 2)), torch.rand(9, 2)
    routing = Routing(experts, EXPERTS)
    y = routing.combine(down(torch.relu(up(routing.send(x), routing.offsets)), routing.offsets), weights)
    expected = torch.zeros(9, IN)
    for token in range(9):
        for expert, weight in zip(experts[token], weights[token]):
            expected[token] += weight * (weights_of(down)[expert] @ torch.relu(weights_of(up)[expert] @ x[token]))
    torch.testing.assert_close(y, expected)


def test_offsets_count_the_choices():
    experts = torch.tensor([[4, 0], [4, 2], [0, 4]])
    routing = Routing(experts, EXPERTS)
    assert routing.offsets.tolist() == [0, 2, 2, 3, 3, 6]
    assert routing.offsets.dtype == torch.int32
    x = torch.arange(3.0)[:, None]
    assert routing.send(x).view(-1).tolist() == [0, 2, 1, 0, 1, 2]
    assert torch.equal(routing.combine(routing.send(x), torch.full((3, 2), 0.5)), x)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)], ids=str)
def test_nothing_to_do(shape):
    module = make()
    y = module.mix(torch.randn(shape[0], IN), torch.zeros(shape, dtype=torch.int64), torch.rand(shape))
    assert torch.equal(y, torch.zeros(shape[0], OUT))


def test_low_precision_is_summed_in_the_dtype_of_the_weights():
    routing = Routing(torch.zeros(1, 3, dtype=torch.int64), 1)
    y = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    assert routing.combine(y, torch.ones(1, 3)).item() == 258  # 256 + 1 is 256 in bfloat16
    assert routing.combine(y, torch.ones(1, 3)).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------------------- errors


def test_wrong_arguments():
    module = make()
    x, offsets = torch.randn(4, IN), spread((1, 1, 1, 1, 0))
    with pytest.raises(NotQuantizedError, match=r"Experts4bit.*\.to\(device\)"):
        Experts4bit(EXPERTS, IN, OUT)(x, offsets)
    with pytest.raises(InvalidArgumentError, match=r"from 0 to 4.*sort"):
        module(x, spread((1, 1, 1, 1, 1)))
    with pytest.raises(InvalidArgumentError, match=r"\[4, 23\].*24"):
        module(torch.randn(4, IN - 1), offsets)
    with pytest.raises(InvalidArgumentError, match=r"blocks of 64.*16 x 3"):
        Experts4bit(EXPERTS, 3, OUT)
    with pytest.raises(InvalidArgumentError, match=r"compute_dtype is torch\.float64"):
        make(compute_dtype=torch.float64)
    with pytest.raises(InvalidArgumentError, match=r"'nf5'"):
        make("nf5")
    for wrong in (-1, EXPERTS):
        with pytest.raises(InvalidArgumentError, match=rf"{wrong} is out of range.*\[0, 5\)"):
            module.mix(torch.randn(2, IN), torch.tensor([[0], [wrong]]), torch.ones(2, 1))
    with pytest.raises(InvalidArgumentError, match=r"experts \[3, 1\].*agree"):
        module.mix(torch.randn(2, IN), torch.zeros(3, 1, dtype=torch.int64), torch.ones(2, 1))
    with pytest.raises(InvalidArgumentError, match=r"weights have shape \[2, 2\].*\[2, 1\]"):
        module.mix(torch.randn(2, IN), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 2))
    with pytest.raises(InvalidArgumentError, match=r"float32.*int64"):
        Routing(torch.zeros(2, 1), EXPERTS)
    with pytest.raises(InvalidArgumentError, match=r"\[2\].*\[tokens, top_k\]"):
        Routing(torch.zeros(2, dtype=torch.int64), EXPERTS)
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), EXPERTS)
    with pytest.raises(InvalidArgumentError, match=r"\[3, 24\].*\[2, features\]"):
        routing.send(torch.randn(3, IN))
    with pytest.raises(InvalidArgumentError, match=r"\[3, 24\].*\[2, features\]"):
        routing.combine(torch.randn(3, IN), torch.ones(2, 1))


def test_blocks_of_a_checkpoint_may_not_span_experts():
    packed, state = functional.quantize_4bit(torch.randn(EXPERTS, OUT, IN), blocksize=256)
    module = make()
    module.load_state_dict({"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}})
    with pytest.raises(InvalidArgumentError, match=r"blocks of 256.*16 x 24"):
        module(torch.randn(1, IN), spread((1, 0, 0, 0, 0)))


# ----------------------------------------------------------------------------------------------------------- checkpoints and copies


@settings
@pytest.mark.parametrize("prepare", [lambda m: m, lambda m: m.to("cpu"), lambda m: m.to("meta")], ids=["new", "quantized", "meta"])
def test_checkpoints_load_strictly(quant_type, nested, storage, prepare):
    source, target = make(quant_type, nested, storage), prepare(Experts4bit(EXPERTS, IN, OUT))
    assert not any(target.load_state_dict(source.state_dict()))
    x, offsets = torch.randn(4, IN), spread((1, 0, 3, 0, 0))
    assert torch.equal(target(x, offsets), source(x, offsets))
    assert target.state_dict().keys() == source.state_dict().keys()


def test_checkpoints_of_parametrized_experts_are_the_same():
    plain = torch.nn.Module()
    plain.weight = torch.nn.Parameter(torch.randn(EXPERTS, OUT, IN))
    module = Experts4bit(EXPERTS, IN, OUT)
    module.load_state_dict(plain.state_dict())
    module.to("cpu")
    replace_parameter_4bit(plain, "weight", compress_statistics=True)
    theirs, ours = plain.state_dict(), module.state_dict()
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    module = make()
    x, offsets = torch.randn(4, IN), spread((1, 0, 3, 0, 0))
    assert torch.equal(copied(module)(x, offsets), module(x, offsets))


def test_casts_leave_the_codes_alone():
    module = make(storage=torch.bfloat16)
    x, offsets = torch.randn(4, IN), spread((1, 0, 3, 0, 0))
    y = module(x, offsets)
    assert torch.equal(module.half()(x, offsets), y)
