"""torch.func and forward-mode differentiation: right results, or an error that says what has no derivative."""

import pytest
import torch

from bnb_core import ops
from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import OPS

pytestmark = [
    pytest.mark.skipif(not REGISTERED, reason="torch.ops.bnb needs torch 2.4"),
    # torch's own forward mode, which scripts its decompositions at first use
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
]

if REGISTERED:
    from torch.autograd import forward_ad
    from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap


class Linear:
    """A linear op on a weight, and the float64 matrix that it multiplies by."""

    def __init__(self, op, args, matrix):
        self.x, *self.rest = args
        self.function = getattr(ops, op)
        names = [parameter.name for parameter in OPS[op].parameters]
        self.bias_at = names.index("bias") - 1 if "bias" in names else None
        self.matrix = matrix

    def __call__(self, x, bias=None):
        rest = list(self.rest)
        if bias is not None:
            rest[self.bias_at] = bias
        return self.function(x, *rest)

    def exactly(self, x):
        """Compute the op in float64, without its bias."""
        return x.double() @ self.matrix.t()


@pytest.fixture(params=["gemm_4bit", "gemm_4bit_transposed", "int8_linear", "int8_linear_transposed"])
def linear(request, example_call, dequantized):
    op = request.param
    if "int8" in op:
        args = example_call(op, **({"threshold": 0.0} if op == "int8_linear" else {}))
        weight = args[1].double() * (args[2].double() / 127)[:, None]
    else:
        args = example_call(op, nested=True)
        _, packed, absmax, codebook, blocksize, N, K = args[:7]
        weight = dequantized(packed, absmax, codebook, blocksize, N * K, args[-1]).view(N, K)
    return Linear(op, args, weight.t() if op.endswith("transposed") else weight)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-4)


def curved(y):
    """Make a scalar whose gradient is not constant."""
    return y.pow(2).sum() / 2


# ----------------------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_vmap_over_x(linear, dim):
    expected = torch.stack([linear(x) for x in linear.x.unbind(dim)])
    close(vmap(linear, in_dims=dim)(linear.x), expected)
    close(vmap(vmap(linear))(linear.x), linear(linear.x))


def test_vmap_with_outliers_works_on_each_call_alone(example_call):
    x, *rest = example_call("int8_linear", threshold=1.0)
    x[0, 0, 0], x[1] = 5.0, x[1].clamp(-0.9, 0.9)
    expected = torch.stack([ops.int8_linear(one, *rest) for one in x])
    assert not torch.equal(ops.int8_linear(x, *rest), expected), "the columns of both calls together would be other ones"
    assert torch.equal(vmap(lambda x: ops.int8_linear(x, *rest))(x), expected)


def test_vmap_over_weights(example_call):
    calls = [example_call("gemm_4bit", nested=True) for _ in range(3)]
    x, bias = calls[0][0], calls[0][7]
    packed, absmax, offsets = (torch.stack(t) for t in zip(*((call[1], call[2], call[8].offset) for call in calls)))
    _, _, _, codebook, blocksize, N, K, _, nested = calls[0]

    def multiply(packed, absmax, offset):
        return ops.gemm_4bit(x, packed, absmax, codebook, blocksize, N, K, bias, nested._replace(offset=offset))

    expected = torch.stack([multiply(*weight) for weight in zip(packed, absmax, offsets)])
    assert torch.equal(vmap(multiply)(packed, absmax, offsets), expected)
    assert torch.equal(vmap(multiply, in_dims=(1, 0, 0), out_dims=1)(packed.t(), absmax, offsets), expected.transpose(0, 1))
    one_packed = vmap(multiply, in_dims=(None, 0, 0))(packed[0], absmax, offsets)
    assert torch.equal(one_packed, torch.stack([multiply(packed[0], *rest) for rest in zip(absmax, offsets)]))


def test_vmap_over_the_bias(example_call):
    x, *weight, bias, nested = example_call("gemm_4bit")
    biases = torch.stack([bias, -bias, 2 * bias])
    result = vmap(lambda bias: ops.gemm_4bit(x, *weight, bias, nested))(biases)
    assert torch.equal(result, torch.stack([ops.gemm_4bit(x, *weight, bias, nested) for bias in biases]))


FIRST_ONLY = [op for op, spec in OPS.items() if spec.outputs and "dequant" not in op and not op.startswith("grouped")]


@pytest.mark.parametrize("op", FIRST_ONLY)
def test_vmap_over_the_first_argument_of_each_op(op, example_call):
    first, *rest = example_call(op)
    several = torch.stack([first, first.flip(0), first.roll(1, -1)])
    function = getattr(ops, op)
    expected = [function(one, *rest) for one in several]
    result = vmap(lambda first: function(first, *rest))(several)
    if len(OPS[op].outputs) == 1:
        close(result, torch.stack(expected))
    else:
        assert all(torch.equal(batch, torch.stack(column)) for batch, column in zip(result, zip(*expected)))


@pytest.mark.parametrize("op", FIRST_ONLY)
def test_vmap_over_nothing(op, example_call):
    first, *rest = example_call(op)
    one = getattr(ops, op)(first, *rest)
    result = vmap(lambda first: getattr(ops, op)(first, *rest))(first[None][:0])
    for batch, single in zip(result if isinstance(result, tuple) else [result], one if isinstance(one, tuple) else [one]):
        assert (batch.shape, batch.dtype) == ((0, *single.shape), single.dtype)


def test_vmap_of_what_depends_on_nothing_batched(example_call):
    x, *weight = example_call("gemm_4bit")
    expected = ops.gemm_4bit(x, *weight)
    close(
        vmap(lambda scale: scale * ops.gemm_4bit(x, *weight))(torch.arange(3.0)),
        torch.stack([0 * expected, expected, 2 * expected]),
    )


# ------------------------------------------------------------------------------------------------------------------- reverse mode


def test_grad(linear):
    y = linear(linear.x)
    close(grad(lambda x: curved(linear(x)))(linear.x), y.double() @ linear.matrix)


def test_vjp(linear):
    y, pull = vjp(linear, linear.x)
    close(pull(y)[0], y.double() @ linear.matrix)


def test_jacrev(linear):
    close(jacrev(linear)(linear.x[0, 0]), linear.matrix)


def test_vmap_of_grad_and_grad_of_vmap(linear):
    rows = linear.x.flatten(0, 1)
    expected = linear(rows).double() @ linear.matrix
    close(vmap(grad(lambda x: curved(linear(x))))(rows), expected)
    close(grad(lambda x: curved(vmap(linear)(x)))(rows), expected)


@pytest.mark.parametrize("linear", ["gemm_4bit", "int8_linear"], indirect=True)
def test_grad_of_the_bias(linear):
    bias = linear.rest[linear.bias_at]
    close(grad(lambda bias: curved(linear(linear.x, bias)))(bias), linear(linear.x).sum((0, 1)))
    close(jacrev(lambda bias: linear(linear.x[0, 0], bias))(bias), torch.eye(bias.numel()))


def test_grad_of_grad(linear):
    x = linear.x[0, 0]
    hessian_of_cube = grad(lambda x: grad(lambda x: linear(x).pow(3).sum())(x).sum())(x)
    y = linear(x).double()
    close(hessian_of_cube, linear.matrix.t() @ (6 * y * linear.matrix.sum(1)))


def test_results_of_what_has_no_derivative_are_constants(example_call):
    x, *rest = example_call("quantize_4bit")
    assert torch.equal(grad(lambda x: x.sum() + ops.quantize_4bit(x, *rest)[1].sum())(x), torch.ones_like(x))


# ------------------------------------------------------------------------------------------------------------------- forward mode


def test_jvp(linear):
    tangent = torch.randn_like(linear.x)
    y, y_tangent = jvp(linear, (linear.x,), (tangent,))
    close(y, linear(linear.x))
    close(y_tangent, linear.exactly(tangent))


@pytest.mark.parametrize("linear", ["gemm_4bit", "int8_linear"], indirect=True)
def test_jvp_of_the_bias(linear):
    bias = linear.rest[linear.bias_at]
    x_tangent, bias_tangent = torch.randn_like(linear.x), torch.randn_like(bias)
    only_bias = jvp(lambda bias: linear(linear.x, bias), (bias,), (bias_tangent,))[1]
    close(only_bias, bias_tangent.expand(only_bias.shape))
    close(jvp(linear, (linear.x, bias), (x_tangent, bias_tangent))[1], linear.exactly(x_tangent) + bias_tangent)


def test_jacfwd(linear):
    close(jacfwd(linear)(linear.x[0, 0]), linear.matrix)


def test_hessian(linear):
    close(hessian(lambda x: curved(linear(x)))(linear.x[0, 0]), linear.matrix.t() @ linear.matrix)


def test_dual_numbers(linear):
    tangent = torch.randn_like(linear.x)
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(linear.x, tangent))
        close(forward_ad.unpack_dual(y).tangent, linear.exactly(tangent))


def test_reverse_over_dual_numbers(linear):
    x, tangent = linear.x.clone().requires_grad_(), torch.randn_like(linear.x)
    with forward_ad.dual_level():
        y, y_tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent)))
        (y * y_tangent).sum().backward()
    close(x.grad, linear.exactly(tangent) @ linear.matrix)


@pytest.mark.parametrize(("op", "at"), [("gemm_4bit", 2), ("quantize_4bit", 0), ("dequantize_4bit", 1), ("int8_matmul_dequant", 3)])
def test_a_tangent_is_never_lost_in_silence(op, at, example_call):
    args = list(example_call(op))

    def call(value):
        return getattr(ops, op)(*args[:at], value, *args[at + 1 :])

    with pytest.raises(InvalidArgumentError, match=f"{op}: a tangent of an argument in which the op has no derivative"):
        jvp(call, (args[at],), (args[at],))
    with forward_ad.dual_level(), pytest.raises(InvalidArgumentError, match="no derivative"):
        call(forward_ad.make_dual(args[at], args[at]))
    with forward_ad.dual_level():
        call(forward_ad.unpack_dual(forward_ad.make_dual(args[at], args[at])).primal)


@pytest.mark.xfail(
    torch.__version__ < (2, 15),
    strict=True,
    reason="torch.library makes an autograd.Function without setup_context of an op with a derivative",
)
def test_grad_within_a_compiled_function(example_call):
    x, *rest = example_call("gemm_4bit")

    def loss(x):
        return ops.gemm_4bit(x, *rest).square().sum()

    torch._dynamo.reset()
    close(torch.compile(grad(loss), backend="aot_eager")(x), grad(loss)(x))


def test_functionalize(linear):
    def add_in_place(x):
        y = linear(x)
        y.add_(1)
        return y

    close(functionalize(add_in_place)(linear.x), linear(linear.x) + 1)
