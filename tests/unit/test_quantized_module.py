"""What every module with a quantized weight does alike: products, gradients, parameters that others put there, transforms."""

import copy

import pytest
import torch
from quantized_layers import DTYPES, IN, OUT, bits, every, expected_product, load, plain_weight, weight_of

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.testing import oracle
from bnb_core.testing.tolerances import as_numpy, assert_product

# ---------------------------------------------------------------------------------------------------------- products and gradients


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_product_is_within_its_bound(make, dtype, bias):
    module = make(bias=bias).to("cpu")
    x = torch.randn(7, IN).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert_product(y, expected_product(module, x), "y")


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_within_their_bound(make, dtype):
    module = make().to("cpu")
    x = torch.randn(7, IN).to(dtype).requires_grad_()
    g = torch.randn(7, OUT).to(dtype)
    module(x).backward(g)
    assert x.grad.dtype == dtype
    weight = as_numpy(weight_of(module))
    assert_product(x.grad, oracle.product(as_numpy(g), weight.T), "the gradient of x")
    total = oracle.product(torch.ones(1, 7).numpy(), as_numpy(g).T)
    assert_product(module.bias.grad.to(dtype), total._replace(y=total.y[0]), "the gradient of the bias")
    assert module.weight.grad is None


@every
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (3, 1, 2), (2, 3, 2, 2)], ids=str)
def test_any_leading_shape(make, shape):
    module = make().to("cpu")
    x = torch.randn(*shape, IN, requires_grad=True)
    y = module(x)
    assert y.shape == (*shape, OUT)
    assert torch.equal(y, module(x.reshape(-1, IN)).reshape(y.shape))
    y.sum().backward()
    assert x.grad.shape == x.shape


@every
def test_inputs_need_not_be_contiguous(make):
    module = make().to("cpu")
    x = torch.randn(IN, 6).t()
    assert torch.equal(module(x), module(x.contiguous()))


@every
def test_gradients_flow_through_a_chain(make):
    first, second = torch.nn.Linear(IN, IN), make().to("cpu")
    x = torch.randn(5, IN)
    second(first(x)).square().sum().backward()
    g = 2 * second(first(x)).detach() @ weight_of(second)
    torch.testing.assert_close(first.weight.grad, g.t() @ x, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_changes_nothing_in_the_module(make, dtype):
    module = make().to("cpu")
    attributes = {name: copy.copy(value) for name, value in module.__dict__.items() if not isinstance(value, dict)}
    tensors = {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items() if "bitsandbytes__" not in name}
    before = bits(module)
    for mode in (True, False):
        module.train(mode)
        module(torch.randn(3, IN).to(dtype).requires_grad_()).sum().backward()
    module.train()
    assert bits(module) == before
    after = {name: value for name, value in module.__dict__.items() if not isinstance(value, dict)}
    assert str(after) == str(attributes)
    kept = {"nested_quant_map", "weight_format"}  # made anew for each checkpoint
    now = {name: value.data_ptr() for name, value in module.state_dict(keep_vars=True).items() if "bitsandbytes__" not in name}
    assert {n: p for n, p in now.items() if n.split(".")[-1] not in kept} == {
        n: p for n, p in tensors.items() if n.split(".")[-1] not in kept
    }


@every
def test_inference_mode(make):
    module = make().to("cpu")
    x = torch.randn(3, IN)
    with torch.inference_mode():
        y = module(x)
    assert torch.equal(y, module(x))


@every
def test_autocast_does_not_lower_the_precision(make):
    module = make().to("cpu")
    x = torch.randn(5, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert_product(y, expected_product(module, x), "y")


@every
def test_tensors_and_attributes_of_ordinary_linear(make):
    module = make()
    assert isinstance(module, torch.nn.Linear)
    assert (module.in_features, module.out_features) == (IN, OUT)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert module.bias.requires_grad
    assert make(bias=False).bias is None


# ----------------------------------------------------------------------------------------------------------------------- bad input


@every
def test_wrong_inputs_raise_one_typed_error(make):
    module = make().to("cpu")
    with pytest.raises(InvalidArgumentError, match=r"\[3, 47\].*48"):
        module(torch.randn(3, IN - 1))
    with pytest.raises(InvalidArgumentError, match=r"\[3, 20\].*48"):
        module(torch.randn(3, OUT))  # not taken for a product with the transposed weight either
    with pytest.raises(InvalidArgumentError, match=r"int64.*cast"):
        module(torch.ones(3, IN, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match=r"float64"):
        module(torch.randn(3, IN, dtype=torch.float64))
    with pytest.raises(InvalidArgumentError, match=r"last dimension"):
        module(torch.randn(()))
    with pytest.raises(InvalidArgumentError, match=r"different devices.*meta"):
        module(torch.randn(3, IN, device="meta"))


# ------------------------------------------------------------------------------------------------------- ordinary parameters, ties


@every
def test_an_ordinary_parameter_serves(make):
    module = make().to("cpu")
    x = torch.randn(3, IN)
    y, before = module(x), bits(module)
    plain_weight(module)
    assert torch.equal(module(x), y)
    assert bits(module) == before
    module.to("cpu")
    assert torch.equal(module(x), y)


@every
def test_swapped_data_serve(make):
    module = make().to("cpu")
    x = torch.randn(3, IN)
    y = module(x)
    whole = module.weight.data
    module.weight.data = torch.empty(0, dtype=whole.dtype)
    module.weight.data = whole.clone()
    assert torch.equal(module(x), y)


@every
def test_a_parameter_that_is_set_brings_its_statistics(make):
    module, other = make().to("cpu"), make().to("cpu")
    module.bias = other.bias
    module.weight = other.weight
    plain_weight(module)
    x = torch.randn(3, IN)
    assert torch.equal(module(x), other(x))


@every
def test_a_parameter_that_is_slipped_in_brings_its_statistics(make):
    """Loaders write to `_parameters`, without the module's knowing."""
    module, other = make().to("cpu"), make().to("cpu")
    module._parameters["weight"] = copy.deepcopy(other.weight)
    module.bias = other.bias
    x = torch.randn(3, IN)
    assert torch.equal(module(x), other(x))
    assert bits(module) == bits(other)


@every
def test_tied_weights(make):
    model = torch.nn.ModuleList([make(), make()])
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    model.to("cpu").half()
    assert model[1].weight is model[0].weight
    x = torch.randn(3, IN)
    assert torch.equal(model[1](x), model[0](x))
    assert_product(model[1](x), expected_product(model[0], x), "y")
    source = torch.nn.ModuleList([make(), make()]).to("cpu").half()
    source[1].weight, source[1].bias = source[0].weight, source[0].bias
    load(model, source.state_dict())
    assert model[1].weight is model[0].weight
    assert torch.equal(model[1](x), source[0](x))
    twin = copy.deepcopy(model)
    assert twin[1].weight is twin[0].weight
    assert torch.equal(twin[1](x), source[0](x))


# ---------------------------------------------------------------------------------------------------------------------- transforms


@every
@pytest.mark.skipif(not REGISTERED, reason="function transforms need registered ops")
def test_function_transforms(make):
    module = make().to("cpu")
    x = torch.randn(4, 3, IN)
    # One by one: which columns are outliers depends on the rows that are given together.
    torch.testing.assert_close(torch.func.vmap(module)(x), torch.stack([module(rows) for rows in x]))
    g = torch.func.grad(lambda x: module(x).square().sum())(x)
    twin = x.clone().requires_grad_()
    module(twin).square().sum().backward()
    torch.testing.assert_close(g, twin.grad)


@every
@pytest.mark.skipif(not REGISTERED, reason="tracing needs registered ops")
def test_tracing(make):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make().to("cpu")
    x, other = torch.randn(3, IN), torch.randn(3, IN)
    assert torch.equal(make_fx(module)(x)(other), module(other))
    assert torch.equal(torch.export.export(module, (x,), strict=False).module()(other), module(other))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(torch.randn(7, IN)).shape == (7, OUT)


@every
@pytest.mark.skipif(not REGISTERED, reason="checkpointing without reentry is that of newer torch")
def test_activation_checkpointing(make):
    from torch.utils.checkpoint import checkpoint

    module = make().to("cpu")
    x = torch.randn(3, IN, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    module(x).square().sum().backward()
    gradients = module.bias.grad.clone()
    module.bias.grad = None
    checkpoint(module, twin, use_reentrant=False).square().sum().backward()
    assert torch.equal(twin.grad, x.grad)
    assert torch.equal(module.bias.grad, gradients)
