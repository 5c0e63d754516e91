"""Gradients of the ops that are linear in their first argument, and of their bias, against float64 matrices."""

import functools
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bnb_core import ops
from bnb_core.backends import Backend, get_backend, register, set_backend, use_backend
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import OPS

needs_registration = pytest.mark.skipif(not REGISTERED, reason="torch.ops.bnb needs torch 2.4")

FOUR_BIT = ["gemm_4bit", "gemm_4bit_transposed", "grouped_gemm_4bit", "grouped_gemm_4bit_transposed"]
INT8 = ["int8_linear", "int8_linear_transposed"]


def run_directly(op, args):
    return getattr(ops, op)(*args)


def run_registered(op, args):
    from bnb_core.ops.schema import flatten

    return getattr(torch.ops.bnb, op)(*flatten(OPS[op], args))


RUNS = [run_directly, pytest.param(run_registered, marks=needs_registration)]


def bias_of(op, args):
    names = [parameter.name for parameter in OPS[op].parameters]
    return args[names.index("bias")] if "bias" in names else None


@pytest.fixture
def exact(dequantized):
    """Compute an op in float64, differentiably: `exact(op, args, x, bias)`. LLM.int8 is taken as linear, as its gradient is."""

    def compute(op, args, x, bias):
        transposed = op.endswith("transposed")
        if op in INT8:
            weight = args[1].double() * (args[2].double() / 127)[:, None]
            return x @ (weight if transposed else weight.t()) + (0 if bias is None else bias)
        _, packed, absmax, codebook, blocksize = args[:5]
        if not op.startswith("grouped"):
            N, K = args[5:7]
            weight = dequantized(packed, absmax, codebook, blocksize, N * K, args[-1]).view(N, K)
            return x @ (weight if transposed else weight.t()) + (0 if bias is None else bias)
        offsets, N, K, nested = args[5:9]
        blocks, rows = absmax.shape[1], []
        for expert, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:])):
            padded = blocks * blocksize
            scales = dequantized_scales(absmax, nested)[expert]
            weight = dequantized(packed[expert], scales, codebook, blocksize, min(padded, N * K)).view(N, K)
            rows.append(x[start:stop] @ (weight if transposed else weight.t()))
        return torch.cat(rows)

    def dequantized_scales(absmax, nested):
        if nested is None:
            return absmax
        groups = torch.tensor([block // nested.blocksize for block in range(absmax.numel())]).view(absmax.shape)
        return nested.codebook[absmax.long()] * nested.absmax[groups] + nested.offset

    return compute


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("op", FOUR_BIT + INT8)
def test_gradients(op, nested, run, example_call, exact):
    args = list(example_call(op, nested=nested and op in FOUR_BIT))
    x, bias = args[0], bias_of(op, args)
    leaves = [tensor for tensor in (x, bias) if tensor is not None]
    doubles = [tensor.double().requires_grad_() for tensor in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    y = run(op, args)
    expected = exact(op, args, *doubles, *([] if bias is not None else [None]))
    if op in FOUR_BIT:
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for leaf, double in zip(leaves, doubles):
        torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("op", FOUR_BIT + INT8)
def test_double_backward(op, run, example_call, exact):
    """The gradient of x is linear in the gradient of y; so is its own derivative, in both."""
    args = list(example_call(op))
    x = args[0].requires_grad_()
    double = x.detach().double().requires_grad_()
    bias = bias_of(op, args)

    def second(x, y):
        weights = torch.ones(y.shape, dtype=y.dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad((y.pow(2) * weights).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), [x, weights])

    # An int8 product is no linear function of x, but for its derivative: its value is taken over.
    y = run(op, args)
    expected = exact(op, args, double, bias.double() if bias is not None else None)
    expected = expected + (y.double() - expected).detach()
    for actual, reference in zip(second(x, y), second(double, expected)):
        torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", FOUR_BIT + INT8)
def test_gradients_have_the_dtype_of_what_they_belong_to(op, dtype, example_call):
    args = example_call(op, dtype)
    leaves = [tensor.requires_grad_() for tensor in (args[0], bias_of(op, args)) if tensor is not None]
    getattr(ops, op)(*args).float().sum().backward()
    assert all(leaf.grad.dtype == dtype and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_only_what_is_asked_for_is_computed(example_call, register_recorder):
    recorder = register_recorder("recorder")
    *args, bias, nested = example_call("gemm_4bit")
    with use_backend("recorder"):
        ops.gemm_4bit(*args, bias.requires_grad_(), nested).sum().backward()
    assert recorder.ran == ["gemm_4bit"], "the gradient of the bias needs no product"


@pytest.mark.parametrize("shape", [(35,), (0, 35), (3, 0, 35)])
def test_gradients_of_few_rows(shape, example_call):
    _, *weight, bias, nested = example_call("gemm_4bit")
    x = torch.randn(shape, requires_grad=True)
    bias.requires_grad_()
    ops.gemm_4bit(x, *weight, bias, nested).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(bias.grad, torch.full((6,), float(shape[0] if len(shape) == 2 else 1 if len(shape) == 1 else 0)))


def test_gradients_of_a_weight_without_rows_or_columns():
    codebook, none = torch.linspace(-1, 1, 16), torch.empty(0, dtype=torch.uint8)
    x = torch.randn(2, 5, requires_grad=True)
    bias = torch.randn(0, requires_grad=True)
    ops.gemm_4bit(x, none, torch.empty(0), codebook, 64, 0, 5, bias).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 5))
    assert bias.grad.shape == (0,)
    x, bias = torch.randn(2, 0, requires_grad=True), torch.randn(3, requires_grad=True)
    y = ops.gemm_4bit(x, none, torch.empty(0), codebook, 64, 3, 0, bias)
    assert torch.equal(y, bias.expand(2, 3))
    y.sum().backward()
    assert x.grad.shape == (2, 0)
    assert torch.equal(bias.grad, torch.full((3,), 2.0))


def test_a_gradient_with_gaps(example_call):
    x, *rest = example_call("gemm_4bit")
    x.requires_grad_()
    weights = torch.randn(6, 4, 2).permute(2, 1, 0)
    (ops.gemm_4bit(x, *rest) * weights).sum().backward()
    with_gaps, x.grad = x.grad, None
    ops.gemm_4bit(x, *rest).backward(weights.contiguous())
    assert torch.equal(x.grad, with_gaps)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("op", ["quantize_blockwise", "quantize_4bit", "int8_quantize_rows", "int8_quantize_rows_cols"])
def test_results_of_what_has_no_derivative_are_constants(op, run, example_call):
    x, *rest = example_call(op)
    assert not any(result.requires_grad for result in run(op, [x.requires_grad_(), *rest]))


@pytest.mark.parametrize("run", RUNS)
def test_scales_are_constants(run, example_call):
    args = list(example_call("gemm_4bit"))
    args[2].requires_grad_()
    assert not ops.gemm_4bit(*args).requires_grad
    args[0].requires_grad_()
    run("gemm_4bit", args).sum().backward()
    assert args[2].grad is None


def test_out_is_refused_where_a_gradient_would_be_lost(example_call):
    x, *rest = example_call("gemm_4bit")
    expected = ops.gemm_4bit(x, *rest)
    out = torch.empty_like(expected)
    with pytest.raises(InvalidArgumentError, match="no gradient passes through out"):
        ops.gemm_4bit(x.requires_grad_(), *rest, out=out)
    with torch.no_grad():
        assert torch.equal(ops.gemm_4bit(x, *rest, out=out), expected)
    with pytest.raises(InvalidArgumentError, match="out for y requires grad"):
        ops.gemm_4bit(x.detach(), *rest, out=out.requires_grad_())


def test_writing_to_out_is_a_change_that_autograd_sees(example_call):
    *args, shape, dtype, nested = example_call("dequantize_4bit")
    out = torch.randn(shape)
    y = (torch.ones(shape, requires_grad=True) * out).sum()
    ops.dequantize_4bit(*args, shape, dtype, nested, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("op", ["optimizer_step_32bit_", "optimizer_step_8bit_blockwise_"])
def test_a_step_is_a_change_that_autograd_sees(op, example_call):
    """Whatever wrote to the parameter: a native kernel does so behind torch's back."""
    backend = Backend("silent", api_version=(1, 0), priority=-1)
    kernel = get_backend("reference").kernels[op]

    @backend.kernel(op, devices={"cpu"}, dtypes=[torch.float32])
    @functools.wraps(kernel.function)
    def write_unseen(params, *args, **keywords):
        kernel.function([param.data for param in params], *args, **keywords)

    register(backend)
    params, *rest = example_call(op)
    before = params[0].clone()
    y = (torch.ones_like(params[0]).requires_grad_() * params[0]).sum()
    with use_backend("silent"):
        getattr(ops, op)(params, *rest)
    assert not torch.equal(params[0], before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_weight_that_changed_is_noticed(example_call):
    x, packed, *rest = example_call("gemm_4bit")
    y = ops.gemm_4bit(x.requires_grad_(), packed, *rest)
    packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ------------------------------------------------------------------------------------------------ the backward's backend and thread


@pytest.mark.parametrize("run", RUNS)
def test_the_backward_runs_where_the_forward_ran(run, example_call, register_recorder):
    one, two = register_recorder("one"), register_recorder("two")
    args = list(example_call("gemm_4bit"))
    args[0].requires_grad_()
    with use_backend("one"):
        y = run("gemm_4bit", args)
    set_backend("two")
    y.sum().backward()
    assert (one.ran, two.ran) == (["gemm_4bit", "gemm_4bit_transposed"], [])


def test_a_double_backward_runs_there_too(example_call, register_recorder):
    one, two = register_recorder("one"), register_recorder("two")
    x, *rest = example_call("gemm_4bit")
    x.requires_grad_()
    with use_backend("one"):
        y = ops.gemm_4bit(x, *rest)
    set_backend("two")
    (gradient,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    gradient.pow(2).sum().backward()
    assert (set(one.ran), two.ran) == ({"gemm_4bit", "gemm_4bit_transposed"}, [])


@pytest.mark.parametrize("run", RUNS)
def test_a_backward_in_another_thread(run, example_call, register_recorder):
    one, two = register_recorder("one"), register_recorder("two")
    set_backend("two")
    args = list(example_call("gemm_4bit"))
    args[0].requires_grad_()
    with use_backend("one"):
        loss = run("gemm_4bit", args).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert (one.ran, two.ran) == (["gemm_4bit", "gemm_4bit_transposed"], [])
    assert args[0].grad is not None


# ---------------------------------------------------------------------------------------------------------- what else holds tensors


def test_saved_tensors_may_be_moved_away(example_call):
    x, *rest = example_call("gemm_4bit", nested=True)
    x.requires_grad_()
    ops.gemm_4bit(x, *rest).sum().backward()
    gradient, x.grad = x.grad, None
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.numpy(), torch.from_numpy):
        y = ops.gemm_4bit(x, *rest)
    assert any(tensor is rest[0] for tensor in packed)
    y.sum().backward()
    assert torch.equal(x.grad, gradient)
    with torch.autograd.graph.save_on_cpu():
        ops.gemm_4bit(x, *rest).sum().backward()
    assert torch.equal(x.grad, 2 * gradient)


@pytest.mark.filterwarnings("ignore:User provided device_type")  # old torch, where there is no GPU
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, example_call, register_recorder):
    recorder = register_recorder("recorder")
    x, *rest = example_call("gemm_4bit")
    x.requires_grad_()

    def block(x):
        return ops.gemm_4bit(x.sin(), *rest).cos()

    block(x).sum().backward()
    gradient, x.grad = x.grad, None
    set_backend("recorder")
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, gradient)
    assert recorder.ran == ["gemm_4bit", "gemm_4bit", "gemm_4bit_transposed"]


@needs_registration
def test_compiled_autograd(example_call):
    """A backward that the compiler takes over as a whole, of an eager forward."""
    from torch._dynamo import compiled_autograd

    x, *rest = example_call("gemm_4bit")
    x.requires_grad_()
    ops.gemm_4bit(x, *rest).sum().backward()
    gradient, x.grad = x.grad, None
    with use_backend("reference"):
        y = ops.gemm_4bit(x, *rest)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.sum().backward()
    assert torch.equal(x.grad, gradient)


@needs_registration
@pytest.mark.parametrize("policy_name", ["MUST_SAVE", "PREFER_RECOMPUTE"])
def test_selective_checkpoint(policy_name, example_call, register_recorder):
    """A policy sees the op, and decides whether its result is kept."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    recorder = register_recorder("recorder")
    x, *rest = example_call("gemm_4bit")
    x.requires_grad_()
    seen = []

    def policy(context, op, *args, **keywords):
        seen.append(op)
        return getattr(CheckpointPolicy, policy_name if op is torch.ops.bnb.gemm_4bit.default else "PREFER_RECOMPUTE")

    def block(x):
        return ops.gemm_4bit(x.sin(), *rest).cos()

    block(x).sum().backward()
    gradient, x.grad = x.grad, None
    set_backend("recorder")
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert torch.ops.bnb.gemm_4bit.default in seen
    assert recorder.ran.count("gemm_4bit") == (1 if policy_name == "MUST_SAVE" else 2)
    assert torch.equal(x.grad, gradient)
