"""torch.compile: whole graphs, static and dynamic shapes, forward and backward, and backends chosen when a graph runs."""

import pytest
import torch

if hasattr(torch, "_dynamo"):
    import torch._dynamo.testing

from bnb_core import ops
from bnb_core.backends import set_backend, use_backend
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import OPS

pytestmark = [
    pytest.mark.skipif(not REGISTERED, reason="torch.ops.bnb needs torch 2.4"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
]

FUNCTIONAL = [op for op, spec in OPS.items() if spec.outputs]
WITH_NESTED = [op for op, spec in OPS.items() if spec.parameters[-1].kind == "nested"]
#: Ops that take any number of rows, which are the first dimension of their first argument, and no tensor with as many elements.
WITH_ROWS = [op for op in FUNCTIONAL if not op.startswith(("grouped", "dequantize")) and "_dequant" not in op]
DIFFERENTIABLE = [
    "gemm_4bit",
    "gemm_4bit_transposed",
    "grouped_gemm_4bit",
    "grouped_gemm_4bit_transposed",
    "int8_linear",
    "int8_linear_transposed",
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    """Compile to one graph, and count in `counts.frame_count` how often that is done."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    result = torch.compile(function, backend=counter, fullgraph=True, **options)
    result.counts = counter
    return result


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "nested"), [(op, False) for op in FUNCTIONAL] + [(op, True) for op in WITH_NESTED])
def test_whole_graph(op, nested, example_call):
    args = example_call(op, torch.bfloat16, nested)
    function = getattr(ops, op)
    assert_same(compiled(lambda *tensors: function(*tensors))(*args), function(*args))


@pytest.mark.parametrize("op", WITH_ROWS)
def test_other_batch_sizes_do_not_compile_again(op, example_call):
    first, *rest = example_call(op)
    function = getattr(ops, op)
    run = compiled(lambda first: function(first, *rest))
    for rows in (3, 5, 8):
        several = torch.cat([first[:1]] * rows)
        torch._dynamo.mark_dynamic(several, 0)
        assert_same(run(several), function(several, *rest))
    assert run.counts.frame_count == 1


@pytest.mark.parametrize("op", ["int8_matmul_dequant", "int8_dequantize_rows"])
def test_other_numbers_of_rows_and_their_scales_do_not_compile_again(op, example_call):
    first, scales, *rest = example_call(op)
    function = getattr(ops, op)
    run = compiled(lambda first, scales: function(first, scales, *rest))
    for rows in (3, 5, 8):
        several = [torch.cat([tensor[:1]] * rows) for tensor in (first, scales)]
        for tensor in several:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_same(run(*several), function(*several, *rest))
    assert run.counts.frame_count == 1


def test_quantize_and_dequantize_in_one_dynamic_graph(example_call):
    _, codebook, blocksize = example_call("quantize_4bit")

    def round_trip(x):
        packed, absmax = ops.quantize_4bit(x, codebook, blocksize)
        return ops.dequantize_4bit(packed, absmax, codebook, blocksize, x.shape, x.dtype)

    run = compiled(round_trip)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 33)
        torch._dynamo.mark_dynamic(x, 0)
        assert_same(run(x), round_trip(x))
    assert run.counts.frame_count == 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_backward(op, dynamic, example_call):
    x, *rest = example_call(op, nested=op in WITH_NESTED)
    names = [parameter.name for parameter in OPS[op].parameters[1:]]
    bias_at = names.index("bias") if "bias" in names else None
    function = getattr(ops, op)

    def gradients(run, x):
        x = x.clone().requires_grad_()
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        arguments = list(rest)
        if bias_at is not None:
            arguments[bias_at] = rest[bias_at].clone().requires_grad_()
        y = run(x, *arguments)
        y.mul(y.detach().sin()).sum().backward()
        return y.detach(), x.grad, None if bias_at is None else arguments[bias_at].grad

    run = compiled(lambda x, *arguments: function(x, *arguments), dynamic=None)
    for rows in (3, 6) if dynamic and not op.startswith("grouped") else (1,):
        several = x.repeat(rows, *[1] * (x.dim() - 1))
        assert_same(gradients(run, several), gradients(function, several))
    assert run.counts.frame_count == 1


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own use of what it deprecates
def test_inductor(example_call):
    x, *weight = example_call("gemm_4bit")
    codes_x, *codes_weight = example_call("int8_linear")

    def block(x, codes_x):
        return ops.gemm_4bit(torch.relu(x) + 1, *weight).tanh().sum() + ops.int8_linear(codes_x * 2, *codes_weight).sum()

    def gradients(run):
        leaves = [x.clone().requires_grad_(), codes_x.clone().requires_grad_()]
        y = run(*leaves)
        y.backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    run = compiled(block, backend="inductor")
    torch.testing.assert_close(gradients(run), gradients(block))
    assert run.counts.frame_count == 1


def test_a_graph_runs_on_the_backend_of_the_moment(example_call, register_recorder):
    register_recorder("one"), register_recorder("two", factor=2)
    x, *weight = example_call("gemm_4bit")
    run = compiled(lambda x: ops.gemm_4bit(x, *weight))
    set_backend("one")
    once = run(x)
    set_backend("two")
    assert_same(run(x), once * 2)
    assert run.counts.frame_count == 1


def test_use_backend_around_a_compiled_call(example_call, register_recorder):
    """The graph's kernels are chosen where and when each part of it runs: backward() outside the context is outside it."""
    one, two = register_recorder("one"), register_recorder("two")
    set_backend("one")
    x, *weight = example_call("gemm_4bit")
    run = compiled(lambda x: ops.gemm_4bit(x, *weight))
    run(x.clone().requires_grad_()).sum().backward()
    assert (one.ran, two.ran) == (["gemm_4bit", "gemm_4bit_transposed"], [])
    with use_backend("two"):
        y = run(x.clone().requires_grad_())
    y.sum().backward()
    assert (one.ran[2:], two.ran) == (["gemm_4bit_transposed"], ["gemm_4bit"])
    assert run.counts.frame_count == 1


def test_vmap_within_a_graph(example_call):
    x, *weight = example_call("gemm_4bit")
    run = compiled(lambda x: torch.func.vmap(lambda x: ops.gemm_4bit(x, *weight))(x))
    assert_same(run(x), ops.gemm_4bit(x, *weight))


def test_out(example_call):
    args = example_call("quantize_4bit")
    expected = ops.quantize_4bit(*args)
    out = tuple(map(torch.empty_like, expected))

    def fill(out, *args):
        ops.quantize_4bit(*args, out=out)

    compiled(fill)(out, *args)
    assert_same(out, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_error_keeps_its_type_and_text(backend, example_call):
    x, *weight = example_call("gemm_4bit")
    with pytest.raises(InvalidArgumentError) as eager:
        ops.gemm_4bit(x[..., 1:], *weight)
    with pytest.raises(InvalidArgumentError) as in_graph:
        torch.compile(lambda x: ops.gemm_4bit(x, *weight), backend=backend)(x[..., 1:])
    assert str(in_graph.value) == str(eager.value)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="its last dimension must be 35"):
        torch.compile(lambda x: ops.gemm_4bit(x, *weight), backend=backend, fullgraph=True)(x[..., 1:])


def test_an_index_outside_the_table_is_found_when_the_graph_runs(example_call):
    indices, *table = example_call("embedding_4bit")
    run = compiled(lambda indices: ops.embedding_4bit(indices, *table))
    run(indices)
    with pytest.raises(InvalidArgumentError, match="is out of range"):
        run(indices + 6)


def test_optimizer_step(example_call):
    """A learning rate on the device may change without compiling again."""
    names = [parameter.name for parameter in OPS["optimizer_step_32bit_"].parameters]
    lr, step = torch.tensor(1e-2), torch.tensor(1.0)

    def run(function, *, steps=3):
        torch.manual_seed(1)
        args = dict(zip(names, example_call("optimizer_step_32bit_")))
        for i in range(steps):
            args.update(lr=lr * (i + 1), step=step + i)
            function(**args)
        return args["params"], args["state1"], args["state2"]

    graph = compiled(lambda **args: ops.optimizer_step_32bit_(**args))
    assert_same(run(graph), run(ops.optimizer_step_32bit_))
    assert graph.counts.frame_count == 1
