"""Modules with quantized weights inside torch.compile: one graph, forward and backward, and the values of eager calls."""

import copy

import pytest
import torch

from bnb_core import nn
from bnb_core.ops.plain import REGISTERED

pytestmark = [
    pytest.mark.skipif(not REGISTERED, reason="this torch has no torch.ops.bnb to trace"),
    # torch's own tracer of autograd functions.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

FEATURES = 64
MAKERS = {
    "nf4": lambda: nn.LinearNF4(FEATURES, FEATURES, compress_statistics=False),
    "nf4-nested-bfloat16": lambda: nn.LinearNF4(FEATURES, FEATURES, compute_dtype=torch.bfloat16),
    "fp4-stored-as-float": lambda: nn.LinearFP4(FEATURES, FEATURES, quant_storage=torch.float32),
    "int8": lambda: nn.Linear8bitLt(FEATURES, FEATURES, has_fp16_weights=False),
    "int8-threshold": lambda: nn.Linear8bitLt(FEATURES, FEATURES, has_fp16_weights=False, threshold=2.0),
    "int8-trained": lambda: nn.Linear8bitLt(FEATURES, FEATURES),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def block(make):
    return torch.nn.Sequential(torch.nn.LayerNorm(FEATURES), make(), torch.nn.GELU(), make()).to("cpu")


def run(model, x):
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_forward_and_backward(make, shape):
    model = block(make)
    x = torch.randn(*shape, FEATURES)
    assert_equal(run(compiled(model), x), run(model, x))


@every
def test_any_batch_without_compiling_again(make):
    model = block(make)
    fast = compiled(model, dynamic=True)
    run(fast, torch.randn(5, FEATURES))
    with torch.compiler.set_stance("fail_on_recompile") if hasattr(torch.compiler, "set_stance") else torch.no_grad():
        for rows in (2, 9, 200):
            x = torch.randn(rows, FEATURES)
            assert_equal(run(fast, x), run(model, x))


@every
def test_without_gradients(make):
    model = block(make).eval()
    fast = compiled(model)
    x = torch.randn(3, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-6, atol=1e-6)


@every
def test_activation_checkpointing(make):
    from torch.utils.checkpoint import checkpoint

    model = block(make)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    x = torch.randn(3, FEATURES)
    assert_equal(run(compiled(Checkpointed()), x), run(model, x))


@every
def test_new_weights_take_effect(make):
    model = block(make)
    other = copy.deepcopy(block(make))
    fast = compiled(model)
    x = torch.randn(3, FEATURES)
    run(fast, x)
    model.load_state_dict(other.state_dict())
    assert_equal(run(fast, x), run(other, x))


def test_ordinary_parameters_serve():
    model = block(MAKERS["nf4"])
    for module in (model[1], model[3]):
        module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
    x = torch.randn(3, FEATURES)
    assert_equal(run(compiled(model), x), run(model, x))


def test_data_of_a_parameter_inside_a_compiled_function():
    module = nn.LinearNF4(FEATURES, FEATURES).to("cpu")
    fast = compiled(lambda x: x + module.weight.data.sum())
    assert torch.equal(fast(torch.zeros(())), module.weight.data.sum().float())
