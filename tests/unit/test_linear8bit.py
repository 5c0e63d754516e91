"""Linear8bitLt: what is particular to int8 weights."""

import copy
import pickle

import pytest
import torch

import bnb_core as bnb
from bnb_core import functional
from bnb_core.errors import CheckpointError, InvalidArgumentError, NotQuantizedError
from bnb_core.nn import Int8Params, Linear8bitLt
from bnb_core.testing import oracle
from bnb_core.testing.tolerances import as_numpy, assert_product

IN, OUT = 96, 24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantized(threshold=0.0, **settings):
    return Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold, **settings).to("cpu")


def expected(module, x):
    codes, absmax = as_numpy(module.weight), as_numpy(module.weight.SCB)
    return oracle.int8_linear(as_numpy(x), codes, absmax, as_numpy(module.bias.to(x.dtype)), module.state.threshold)


def test_constructor_arguments_reach_state_and_parameter():
    module = Linear8bitLt(IN, OUT, False, False, 6.0, None, "meta")
    assert (module.in_features, module.out_features, module.bias, module.index) == (IN, OUT, None, None)
    assert (module.state.threshold, module.state.has_fp16_weights, module.state.use_pool) == (6.0, False, True)
    assert (module.weight.has_fp16_weights, module.weight.requires_grad) == (False, False)
    assert module.weight.is_meta


def test_defaults():
    module = Linear8bitLt(IN, OUT)
    assert (module.state.threshold, module.state.has_fp16_weights, module.state.use_pool) == (0.0, True, False)
    assert (module.weight.has_fp16_weights, module.weight.requires_grad) == (True, True)


def test_bad_arguments():
    with pytest.raises(InvalidArgumentError, match=r"threshold is -1.0.*positive"):
        Linear8bitLt(IN, OUT, threshold=-1.0)
    with pytest.raises(InvalidArgumentError, match=r"threshold is nan"):
        Linear8bitLt(IN, OUT, threshold=float("nan"))
    with pytest.raises(InvalidArgumentError, match=r"index must be None"):
        Linear8bitLt(IN, OUT, index=torch.arange(IN))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_every_dtype_are_quantized_as_they_are(dtype):
    module = Linear8bitLt(IN, OUT, has_fp16_weights=False)
    values = (torch.randn(OUT, IN) * 1e5).to(dtype) if dtype != torch.float16 else torch.randn(OUT, IN).half()
    module.weight.data = values
    module.to("cpu")
    codes, absmax, _ = functional.int8_vectorwise_quant(values)
    assert torch.equal(module.weight.data, codes)
    assert torch.equal(module.weight.SCB, absmax)
    assert absmax.isfinite().all()  # beyond what float16 holds
    assert module.state.SCB is module.weight.SCB
    assert module.weight.CB.data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_outliers(dtype, threshold):
    module = quantized(threshold)
    x = torch.randn(6, IN)
    x[:, [3, 40]] *= 50
    x = x.to(dtype)
    y = module(x)
    assert_product(y, expected(module, x), "y")
    weight = functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).double()
    error = (y.double() - x.double() @ weight.t() - module.bias.double()).norm() / y.double().norm()
    assert (error < 5e-3) == (threshold > 0)  # what the threshold is for


def test_large_inputs_do_not_overflow():
    """float16, which bitsandbytes casts inputs to, ends at 65504."""
    module = quantized()
    x = torch.randn(3, IN) * 1e6
    assert module(x).isfinite().all()
    assert_product(module(x), expected(module, x), "y")


def test_the_mode_is_known_to_the_state():
    module = quantized()
    assert module.state.is_training
    assert torch.nn.Sequential(module).eval()
    assert not module.state.is_training
    module.train()
    assert module.state.is_training


def test_init_8bit_state():
    module = quantized(bias=False)
    x = torch.randn(3, IN)
    y, saved, scales = module(x), module.state_dict(), module.weight.SCB
    for _ in range(2):
        module.init_8bit_state()
        assert module.weight.CB is module.weight.SCB is None
        assert module.state.SCB is scales
        assert module.state.CB.data_ptr() == module.weight.data_ptr()
    module.half().to("cpu").float()
    assert module.state.CB.data_ptr() == module.weight.data_ptr()
    assert torch.equal(module(x), y)
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert module.to("meta").state.CB.is_meta
    assert module.state.SCB.is_meta


def test_codes_of_the_state_are_those_that_the_weight_has_now():
    module = quantized(bias=False)
    assert module.state.CB.data_ptr() == module.weight.data_ptr()
    other = quantized(bias=False)
    module._parameters["weight"] = other.weight  # as libraries that offload weights do
    assert module.state.CB.data_ptr() == other.weight.data_ptr()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.state == module.state
        assert twin.state.CB.data_ptr() == twin.weight.data_ptr() != module.weight.data_ptr()
        twin.state.SCB = twin.state.SCB * 2
        assert twin.state != module.state
    module.state.CB = torch.zeros_like(module.weight)
    assert not module.weight.any()
    alone = copy.copy(module.state)
    del module
    assert alone.CB is None


def test_a_product_with_the_state_leaves_a_weight_in_floating_point_as_it_is():
    module = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=True)
    x = torch.randn(3, IN)
    before = module.weight.detach().clone()
    assert module.state.CB is None
    y = bnb.matmul(x, module.weight, state=module.state)
    assert torch.equal(y, module(x))
    assert torch.equal(module.weight, before)
    assert module.state.CB.dtype == torch.int8


def test_scales_that_a_loader_sets_serve():
    source = quantized(bias=False)
    module = Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False, device="meta")
    module._parameters["weight"] = Int8Params(source.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
    x = torch.randn(3, IN)
    with pytest.raises(NotQuantizedError, match=r"SCB"):
        module(x)
    module.weight.SCB = source.weight.SCB
    assert torch.equal(module(x), source(x))
    assert list(module.state_dict()) == ["weight", "SCB", "weight_format"]


# ----------------------------------------------------------------------------------------------------------- floating-point weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not-yet-quantized"])
def test_floating_point_weights_are_quantized_for_each_product(dtype, keep):
    module = Linear8bitLt(IN, OUT, has_fp16_weights=keep)
    if keep:
        module.to("cpu")
    assert type(module.weight) is Int8Params
    assert module.weight.dtype == torch.float32
    x = torch.randn(5, IN).to(dtype)
    codes, absmax, _ = functional.int8_vectorwise_quant(module.weight.detach())
    product = oracle.int8_linear(as_numpy(x), as_numpy(codes), as_numpy(absmax), as_numpy(module.bias.to(dtype)), 0.0)
    assert_product(module(x), product, "y")
    assert module.weight.dtype == torch.float32
    assert module.state.SCB is None
    assert list(module.state_dict()) == ["weight", "bias"]


def test_casts_reach_floating_point_weights():
    module = Linear8bitLt(IN, OUT).to("cpu", torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert type(module.weight) is Int8Params
    assert module.weight.requires_grad
    assert module.to("meta").weight.has_fp16_weights
    assert type(module.weight) is Int8Params


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_floating_point_weights_have_a_gradient(threshold):
    module = Linear8bitLt(IN, OUT, threshold=threshold)
    x, g = torch.randn(64, IN, requires_grad=True), torch.randn(64, OUT)
    module(x).backward(g)
    weight = functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(module.weight.detach())[:2])
    assert_product(x.grad, oracle.product(as_numpy(g), as_numpy(weight).T), "the gradient of x")
    exact = g.double().t() @ x.detach().double()
    error = (module.weight.grad.double() - exact).norm() / exact.norm()
    assert error < (1e-6 if threshold else 1.5e-2)  # int8 has a step of 1/254 of the largest


def test_gradients_survive_a_move():
    module = Linear8bitLt(IN, OUT)
    module(torch.randn(4, IN)).sum().backward()
    gradient = module.weight.grad.clone()
    module.double()
    assert module.weight.grad.dtype == torch.float64
    assert torch.equal(module.weight.grad.float(), gradient)
    assert module.to("meta").weight.grad.is_meta


def test_training_learns():
    torch.manual_seed(1)
    module, target = Linear8bitLt(IN, OUT), torch.nn.Linear(IN, OUT)
    optimizer = torch.optim.SGD(module.parameters(), lr=3.0)
    losses = []
    for _ in range(30):
        x = torch.randn(256, IN)
        loss = (module(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20


# --------------------------------------------------------------------------------------------------------------------- checkpoints


def test_entries():
    module = quantized()
    saved = module.state_dict()
    assert list(saved) == ["weight", "bias", "SCB", "weight_format"]
    assert (saved["weight"].dtype, saved["weight"].shape) == (torch.int8, (OUT, IN))
    assert (saved["SCB"].dtype, saved["SCB"].shape) == (torch.float32, (OUT,))
    assert (saved["weight_format"].dtype, saved["weight_format"].shape, saved["weight_format"].item()) == (torch.uint8, (), 0)


@pytest.mark.parametrize("weight_format", [0, "row", torch.tensor(0, dtype=torch.uint8), None])
def test_formats_that_are_row_major(weight_format):
    source, module = quantized(), quantized()
    saved = {**source.state_dict(), "weight_format": weight_format}
    if weight_format is None:
        del saved["weight_format"]
    assert not any(module.load_state_dict(saved))
    assert torch.equal(module.weight.data, source.weight.data)


@pytest.mark.parametrize("weight_format", ["col_turing", 2, torch.tensor(1, dtype=torch.uint8), torch.tensor([0, 0])])
def test_formats_that_are_not(weight_format):
    with pytest.raises(CheckpointError, match=r"weight_format is .*row-major"):
        quantized().load_state_dict({**quantized().state_dict(), "weight_format": weight_format})


@pytest.mark.parametrize(
    "scales", [torch.ones(OUT + 1), torch.ones(OUT, dtype=torch.float16), torch.ones(OUT, 1), [1.0] * OUT], ids=repr
)
def test_scales_that_do_not_fit(scales):
    module = quantized()
    before = module.state_dict()
    with pytest.raises(CheckpointError, match=r"layer\.weight: SCB is .*torch.float32 \[24\]"):
        torch.nn.ModuleDict({"layer": module}).load_state_dict({f"layer.{k}": v for k, v in {**before, "SCB": scales}.items()})
    assert torch.equal(module.state_dict()["SCB"], before["SCB"])


def test_codes_do_not_load_into_a_module_that_keeps_floating_point():
    with pytest.raises(CheckpointError, match=r"has_fp16_weights=False"):
        Linear8bitLt(IN, OUT).load_state_dict(quantized().state_dict())


def test_scales_without_codes_are_unexpected():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*SCB"):
        quantized().load_state_dict({**torch.nn.Linear(IN, OUT).state_dict(), "SCB": torch.ones(OUT)})
