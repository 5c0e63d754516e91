"""Tracers see ops, not what a kernel computed for one input: make_fx, torch.jit.trace, torch.export, AOT, fake and meta tensors."""

import copy
import io

import pytest
import torch

from bnb_core import ops
from bnb_core.backends import set_backend
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import OPS

pytestmark = [
    pytest.mark.skipif(not REGISTERED, reason="torch.ops.bnb needs torch 2.4"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
]

if REGISTERED:
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

FUNCTIONAL = [op for op, spec in OPS.items() if spec.outputs]
WITH_NESTED = [op for op, spec in OPS.items() if spec.parameters[-1].kind == "nested"]


class Linear(torch.nn.Module):
    """x W^T + bias, with everything in buffers and parameters."""

    def __init__(self, call):
        super().__init__()
        _, packed, absmax, codebook, self.blocksize, self.N, self.K, bias, _ = call
        for name, value in (("packed", packed), ("absmax", absmax), ("codebook", codebook)):
            self.register_buffer(name, value)
        self.bias = torch.nn.Parameter(bias)

    def forward(self, x):
        return ops.gemm_4bit(x, self.packed, self.absmax, self.codebook, self.blocksize, self.N, self.K, self.bias)


@pytest.fixture
def call(example_call):
    return example_call("gemm_4bit")


def called(graph):
    """List the ops of this package that a graph calls."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    return [target for target in targets if getattr(target, "namespace", "") == "bnb"]


# -------------------------------------------------------------------------------------------------------------------------- make_fx


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", FUNCTIONAL)
def test_make_fx(op, mode, example_call):
    first, *rest = example_call(op)
    _, *other = example_call(op)
    function = getattr(ops, op)
    tensors = [at for at, value in enumerate(rest) if isinstance(value, torch.Tensor)]

    def run(first, *given):
        args = list(rest)
        for at, value in zip(tensors, given):
            args[at] = value
        return function(first, *args)

    graph = make_fx(run, tracing_mode=mode)(first, *(rest[at] for at in tensors))
    assert called(graph.graph) == [getattr(torch.ops.bnb, op).default]
    given = [first.flip(0), *(other[at] for at in tensors)]
    torch.testing.assert_close(graph(*given), run(*given), rtol=0, atol=0)


def test_make_fx_of_a_gradient(call):
    x, *rest = call

    def gradient(x):
        return torch.func.grad(lambda x: ops.gemm_4bit(x, *rest).pow(2).sum())(x)

    graph = make_fx(gradient)(x)
    assert called(graph.graph) == [torch.ops.bnb.gemm_4bit.default, torch.ops.bnb.gemm_4bit_transposed.default]
    torch.testing.assert_close(graph(x.flip(0)), gradient(x.flip(0)))


def test_symbolic_trace(call):
    x, *rest = call
    graph = torch.fx.symbolic_trace(lambda x: ops.gemm_4bit(x, *rest))
    assert called(graph.graph) == [torch.ops.bnb.gemm_4bit.default]
    assert torch.equal(graph(x.flip(0)), ops.gemm_4bit(x.flip(0), *rest))


def test_a_graph_may_be_copied(call, register_recorder):
    x, *rest = call
    register_recorder("other", factor=2)
    graph = copy.deepcopy(make_fx(lambda x: ops.gemm_4bit(x, *rest))(x))
    expected = ops.gemm_4bit(x, *rest)
    assert torch.equal(graph(x), expected)
    set_backend("other")
    assert torch.equal(graph(x), 2 * expected)


# ------------------------------------------------------------------------------------------------------------------ torch.jit.trace


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_jit_trace(call, register_recorder):
    register_recorder("other", factor=2)
    linear = Linear(call)
    traced = torch.jit.trace(linear, call[0])
    assert "bnb::gemm_4bit" in str(traced.inlined_graph)
    x = torch.randn(7, linear.K)
    expected = linear(x)
    assert torch.equal(traced(x), expected)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    set_backend("other")
    assert torch.equal(traced(x), 2 * expected)
    assert torch.equal(torch.jit.load(file)(x), 2 * expected)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_jit_trace_of_a_backward(call):
    linear = Linear(call)
    traced = torch.jit.trace(linear, call[0])
    x, same = (torch.randn(2, linear.K, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    traced(x).sum().backward()
    bias_gradient, linear.bias.grad = linear.bias.grad, None
    linear(same).sum().backward()
    assert torch.equal(x.grad, same.grad)
    assert torch.equal(bias_gradient, linear.bias.grad)


# ----------------------------------------------------------------------------------------------------------- export, ahead of time


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, call):
    linear = Linear(call)
    rows = torch.export.Dim("rows", min=2, max=99)
    program = torch.export.export(linear, (call[0],), dynamic_shapes=({0: rows},), strict=strict)
    assert called(program.graph) == [torch.ops.bnb.gemm_4bit.default]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(9, *call[0].shape[1:])
    for exported in (program, torch.export.load(file), program.run_decompositions()):
        assert torch.equal(exported.module()(x), linear(x))


def test_export_of_what_does_not_fit(call):
    with pytest.raises(InvalidArgumentError, match="its last dimension must be 35"):
        torch.export.export(Linear(call), (call[0][..., 1:],), strict=False)


def test_aot_export_of_forward_and_backward(call):
    class Loss(Linear):
        def forward(self, x):
            return (super().forward(x).pow(2).sum(),)

    x = call[0].clone().requires_grad_()
    graph, signature = aot_export_module(Loss(call), (x,), trace_joint=True, output_loss_index=0)
    assert called(graph.graph) == [torch.ops.bnb.gemm_4bit.default, torch.ops.bnb.gemm_4bit_transposed.default]
    assert signature.backward_signature.gradients_to_user_inputs


# ----------------------------------------------------------------------------------------------------------- fake and meta tensors


@pytest.mark.parametrize(("op", "nested"), [(op, False) for op in FUNCTIONAL] + [(op, True) for op in WITH_NESTED])
def test_fake_tensors(op, nested, example_call):
    real = example_call(op, nested=nested)
    results = getattr(ops, op)(*real)
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, real)
        in_mode = getattr(ops, op)(*fake)
    outside = getattr(ops, op)(*fake)
    for imitations in (in_mode, outside):
        for imitation, result in zip(*(r if isinstance(r, tuple) else [r] for r in (imitations, results))):
            assert isinstance(imitation, torch._subclasses.FakeTensor)
            assert (imitation.shape, imitation.dtype, imitation.device) == (result.shape, result.dtype, result.device)
            assert imitation.stride() == result.stride()


@pytest.mark.parametrize("op", FUNCTIONAL)
def test_meta_tensors(op, example_call):
    real = example_call(op)
    results = getattr(ops, op)(*real)
    imitations = getattr(ops, op)(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in real))
    for imitation, result in zip(*(r if isinstance(r, tuple) else [r] for r in (imitations, results))):
        assert (imitation.shape, imitation.dtype, imitation.device.type) == (result.shape, result.dtype, "meta")


def test_meta_tensors_have_gradients(call):
    x, *rest = (value.to("meta") if isinstance(value, torch.Tensor) else value for value in call)
    x.requires_grad_()
    ops.gemm_4bit(x, *rest).sum().backward()
    assert (x.grad.shape, x.grad.device.type) == (x.shape, "meta")


@pytest.mark.parametrize("op", [op for op in FUNCTIONAL if not op.startswith("int8_quantize")])
def test_meta_and_real_tensors_do_not_mix(op, example_call):
    first, *rest = example_call(op)
    with pytest.raises(InvalidArgumentError, match="different devices"):
        getattr(ops, op)(first.to("meta"), *rest)
