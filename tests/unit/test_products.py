"""Products with quantized weights: results, gradients, orientations, states."""

import copy
import pickle
import warnings

import pytest
import torch

import bnb_core as bnb
from bnb_core import functional as F
from bnb_core.errors import InvalidArgumentError

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_product(y, x, weight, bias=None):
    """Check x weight^T + bias against float64, element by element, with the bound that every backend keeps."""
    x, weight = x.detach().double(), weight.detach().double()
    exact = x @ weight.t() + (0.0 if bias is None else bias.detach().double())
    unit = UNIT[y.dtype]
    bound = unit * exact.abs() + (unit + 2.0**-24 * weight.shape[1]) * (x.abs() @ weight.t().abs())
    assert y.shape == exact.shape
    assert ((y.detach().double() - exact).abs() <= bound + torch.finfo(y.dtype).tiny).all()


def quantized(shape, **options):
    packed, state = F.quantize_4bit(torch.randn(shape), quant_type="nf4", **options)
    exact = copy.deepcopy(state)
    exact.dtype = torch.float32
    return packed, state, F.dequantize_4bit(packed, exact)


# ------------------------------------------------------------------------------------------------------------------------- 4 bits


@dtypes
@nested_or_not
@pytest.mark.parametrize("shape", [(1, 1), (48, 64), (7, 33)], ids=str)
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)], ids=str)
def test_matmul_4bit(dtype, nested, shape, batch):
    packed, state, weight = quantized(shape, compress_statistics=nested)
    x = torch.randn(*batch, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for B in (packed, packed.t(), torch.nn.Parameter(packed, requires_grad=False)):
        assert_product(bnb.matmul_4bit(x, B, state), x, weight)
        assert_product(bnb.matmul_4bit(x, B, state, bias=bias), x, weight, bias)
    assert torch.equal(F.gemv_4bit(x, packed.t(), state=state), bnb.matmul_4bit(x, packed, state))


@dtypes
@nested_or_not
def test_matmul_4bit_gradients(dtype, nested):
    packed, state, weight = quantized((48, 33), compress_statistics=nested)
    x = torch.randn(2, 5, 33).to(dtype).requires_grad_()
    bias = torch.randn(48).to(dtype).requires_grad_()
    g = torch.randn(2, 5, 48).to(dtype)
    bnb.matmul_4bit(x, packed, state, bias=bias).backward(g)
    assert_product(x.grad, g, weight.t())
    assert torch.equal(bias.grad, g.view(-1, 48).sum(0))
    assert packed.grad is None


@pytest.mark.parametrize("grad", [False, True])
@nested_or_not
def test_matmul_4bit_fills_a_given_output(grad, nested):
    packed, state, _ = quantized((48, 33), compress_statistics=nested)
    x = torch.randn(5, 33, requires_grad=grad)
    expected = bnb.matmul_4bit(x, packed, state)
    out = torch.full((48, 5), float("nan")).t()
    assert bnb.matmul_4bit(x, packed, state, out=out) is out
    assert torch.equal(out, expected)
    if grad:
        out.sum().backward()
        filled, x.grad = x.grad, None
        expected.sum().backward()
        assert torch.equal(filled, x.grad)
    else:
        y = torch.zeros(5, 48)
        assert F.gemv_4bit(x, packed, out=y, state=state) is y
        assert torch.equal(y, expected)


@dtypes
@nested_or_not
def test_transposed_weights_warn_and_work(dtype, nested):
    packed, state, weight = quantized((33, 48), compress_statistics=nested)
    x = torch.randn(2, 5, 33).to(dtype).requires_grad_()
    bias = torch.randn(48).to(dtype).requires_grad_()
    with pytest.warns(DeprecationWarning, match=r"\[33, 48\].*Re-quantize from the weight"):
        product = bnb.matmul_4bit(x.detach(), packed, state)
    assert_product(product, x, weight.t())
    with pytest.warns(DeprecationWarning, match="Re-quantize"):
        y = bnb.matmul_4bit(x, packed, state, bias=bias)
    assert torch.equal(y, product + bias)
    g = torch.randn(2, 5, 48).to(dtype)
    y.backward(g)
    assert_product(x.grad, g, weight)
    assert torch.equal(bias.grad, g.view(-1, 48).sum(0))
    out = torch.empty(2, 5, 48, dtype=dtype)
    with pytest.warns(DeprecationWarning, match="Re-quantize"):
        assert bnb.matmul_4bit(x.detach(), packed, state, out, bias.detach()) is out
    assert torch.equal(out, y.detach())


def test_the_warning_points_at_the_caller():
    packed, state, _ = quantized((33, 48))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bnb.matmul_4bit(torch.randn(33), packed, state)
    assert [warning.filename for warning in caught] == [__file__]


def test_square_weights_are_rows_by_columns():
    packed, state, weight = quantized((32, 32))
    x = torch.randn(4, 32)
    assert_product(bnb.matmul_4bit(x, packed, state), x, weight)  # and no warning, which would be an error


@pytest.mark.parametrize(("shape", "batch"), [((8, 0), (3,)), ((0, 8), (3,)), ((8, 16), (0,)), ((8, 16), (2, 0))], ids=str)
def test_empty_products(shape, batch):
    packed, state = F.quantize_4bit(torch.randn(shape))
    x = torch.randn(*batch, shape[1], requires_grad=True)
    bias = torch.randn(shape[0], requires_grad=True)
    y = bnb.matmul_4bit(x, packed, state, bias=bias)
    assert torch.equal(y, bias.expand(*batch, shape[0]))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(*batch, shape[1]))
    assert (bias.grad == torch.Size(batch).numel()).all()


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.int8], ids=str)
def test_weights_stored_in_other_dtypes(storage):
    x, w = torch.randn(3, 64), torch.randn(16, 64)
    packed, state = F.quantize_4bit(w)
    stored, _ = F.quantize_4bit(w, quant_storage=storage)
    assert torch.equal(bnb.matmul_4bit(x, stored.t(), state), bnb.matmul_4bit(x, packed, state))


x = torch.randn(4, 33)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, s: bnb.matmul_4bit(x, p, None), "state of the weight is None"),
        (lambda p, s: F.gemv_4bit(x, p), "state of the weight is None"),
        (lambda p, s: bnb.matmul_4bit(x[:, 1:], p, s), r"x has shape \[4, 32\]; its last dimension must be 33"),
        (lambda p, s: bnb.matmul_4bit(torch.tensor(1.0), p, s), "its last dimension must be 33"),
        (lambda p, s: bnb.matmul_4bit(x.double(), p, s), "x is torch.float64"),
        (lambda p, s: bnb.matmul_4bit(x, p[1:], s), "packed has 395 elements.* 396"),
        (lambda p, s: bnb.matmul_4bit(x, p, s, bias=torch.ones(24).half()), "bias is torch.float16"),
        (lambda p, s: bnb.matmul_4bit(x, p, s, bias=torch.ones(33)), r"bias has shape \[33\]"),
        (lambda p, s: bnb.matmul_4bit(x, p, s, out=torch.ones(4, 33)), r"out for y is torch.float32 \[4, 33\]"),
        (lambda p, s: bnb.matmul_4bit(x, p.to("meta"), s), "different devices"),
        (lambda p, s: F.gemv_4bit(x, p, transposed_B=True, state=s), "must be False"),
        (lambda p, s: bnb.matmul_4bit(x, *F.quantize_4bit(torch.ones(2, 3, 33))), r"shape is \[2, 3, 33\]"),
        (lambda p, s: bnb.matmul_4bit(x, *F.quantize_blockwise(torch.ones(24, 33))), "shape is None"),
    ],
)
def test_bad_4bit_arguments_are_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(*F.quantize_4bit(torch.ones(24, 33)))


def test_transposed_weights_check_their_bias_too():
    packed, state, _ = quantized((33, 48))
    with pytest.warns(DeprecationWarning, match="Re-quantize"), pytest.raises(InvalidArgumentError, match="bias"):
        bnb.matmul_4bit(x, packed, state, bias=torch.ones(33))


# ------------------------------------------------------------------------------------------------------------------------- 8 bits


def inference_state(weight, threshold=0.0):
    state = bnb.MatmulLtState(has_fp16_weights=False, threshold=threshold)
    state.CB, state.SCB, _ = F.int8_vectorwise_quant(weight)
    return state


def int8_oracle(x, state, bias=None):
    """What LLM.int8() computes from the quantized input and weight, in float64; the bound of the rounding is the caller's."""
    x = x.detach()
    rows = x.reshape(-1, x.shape[-1])
    codes, absmax, outliers = F.int8_vectorwise_quant(rows, threshold=state.threshold)
    weight = state.CB.double() * state.SCB.double()[:, None] / 127
    y = (codes.double() * absmax.double()[:, None] / 127) @ weight.t()
    if outliers is not None:
        y += rows[:, outliers].double() @ weight[:, outliers].t()
    return (y if bias is None else y + bias.detach().double()).view(*x.shape[:-1], -1)


@dtypes
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3)], ids=str)
def test_matmul(dtype, threshold, batch):
    weight, x = torch.randn(24, 40), torch.randn(*batch, 40).to(dtype)
    x[..., 7] = 3.0
    before = x.clone()
    state = inference_state(weight, threshold)
    bias = torch.randn(24).to(dtype)
    y = bnb.matmul(x, state.CB, state=state, bias=bias)
    assert torch.equal(x, before)
    assert y.dtype == dtype
    assert y.shape == (*batch, 24)
    exact = int8_oracle(x, state, bias)
    assert ((y.double() - exact).abs() <= UNIT[dtype] * (exact.abs() + 40)).all()
    if threshold:
        expected = F.int8_vectorwise_quant(x.reshape(-1, 40), threshold)[2]
        assert 7 in expected
        assert state.idx.dtype == torch.int64
        assert torch.equal(state.idx, expected)
    else:
        assert state.idx is None


def test_a_threshold_that_is_passed_stays():
    state = inference_state(torch.randn(4, 8))
    x = torch.randn(3, 8)
    y = bnb.matmul(x, state.CB, state=state, threshold=1.0)
    assert state.threshold == 1.0
    assert torch.equal(bnb.matmul(x, state.CB, state=state), y)


def test_bias_of_another_dtype_is_cast():
    state = inference_state(torch.randn(4, 8))
    x, bias = torch.randn(3, 8).half(), torch.randn(4)
    assert torch.equal(bnb.matmul(x, state.CB, state=state, bias=bias), bnb.matmul(x, state.CB, state=state, bias=bias.half()))


def test_weights_are_quantized_where_the_state_has_none():
    weight, x = torch.randn(24, 40), torch.randn(3, 40)
    expected = bnb.matmul(x, weight.to(torch.int8), state=inference_state(weight))
    assert torch.equal(bnb.matmul(x, weight), expected)
    assert torch.equal(bnb.matmul(x, weight.t().contiguous().t()), expected)
    state = bnb.MatmulLtState(has_fp16_weights=False)
    assert torch.equal(bnb.matmul(x, weight, state=state), expected)
    codes = state.CB
    bnb.matmul(x, weight + 1, state=state)
    assert state.CB is codes, "without fp16 weights, the codes are what counts"


@pytest.mark.parametrize("training", [True, False])
def test_trained_weights_are_quantized_anew(training):
    """Also in evaluation, and while gradients accumulate: an optimizer may have stepped in between."""
    weight = torch.nn.Parameter(torch.randn(24, 40))
    state = bnb.MatmulLtState()
    state.is_training = training
    x = torch.randn(3, 40)
    bnb.matmul(x, weight, state=state).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight += 1
    assert torch.equal(bnb.matmul(x, weight, state=state), bnb.matmul(x, weight.detach()))


@dtypes
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_matmul_gradients(dtype, threshold):
    weight = torch.nn.Parameter(torch.randn(24, 40).to(dtype))
    x = torch.randn(2, 16, 40).to(dtype).requires_grad_()
    bias = torch.nn.Parameter(torch.randn(24).to(dtype))
    state = bnb.MatmulLtState(threshold=threshold)
    y = bnb.matmul(x, weight, state=state, bias=bias)
    assert ((y.double() - int8_oracle(x, state, bias)).abs() <= UNIT[dtype] * (y.double().abs() + 40)).all()
    g = torch.randn(2, 16, 24).to(dtype)
    y.backward(g)
    dequantized = state.CB.double() * state.SCB.double()[:, None] / 127
    assert_product(x.grad, g, dequantized.t())
    assert torch.equal(bias.grad, g.view(-1, 24).sum(0))
    exact = g.view(-1, 24).double().t() @ x.detach().view(-1, 40).double()
    error = (weight.grad.double() - exact).abs()
    magnitude = g.view(-1, 24).double().abs().t() @ x.detach().view(-1, 40).double().abs()
    assert weight.grad.dtype == dtype
    if threshold:  # in the input's dtype
        assert (error <= (2 * UNIT[dtype] + 2**-18) * magnitude).all()
    else:  # both factors off by half a step of their column
        steps = [t.abs().amax(0).double() / 254 for t in (g.view(-1, 24), x.detach().view(-1, 40))]
        sums = [t.abs().double().sum(0) for t in (g.view(-1, 24), x.detach().view(-1, 40))]
        bound = torch.outer(steps[0], sums[1]) + torch.outer(sums[0], steps[1]) + 32 * torch.outer(*steps)
        assert (error <= bound + 2 * UNIT[dtype] * magnitude).all()


def test_only_the_gradients_that_are_needed():
    weight = torch.nn.Parameter(torch.randn(24, 40))
    x = torch.randn(3, 40)
    bnb.matmul(x, weight).sum().backward()
    assert weight.grad is not None
    frozen = weight.detach()
    x.requires_grad_()
    bnb.matmul(x, frozen).sum().backward()
    assert x.grad is not None
    assert frozen.grad is None
    with torch.no_grad():
        assert not bnb.matmul(x, weight).requires_grad


def test_the_weight_gradient_has_no_second_derivative():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(bnb.matmul(x, weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_matmul_of_nothing(trained, threshold):
    weight = torch.nn.Parameter(torch.randn(4, 8), requires_grad=trained)
    x = torch.randn(2, 0, 8, requires_grad=True)
    y = bnb.matmul(x, weight, threshold=threshold, bias=torch.ones(4))
    assert y.shape == (2, 0, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not trained or torch.equal(weight.grad, torch.zeros(4, 8))


@pytest.mark.parametrize("grad", [False, True])
def test_matmul_fills_a_given_output(grad):
    state = inference_state(torch.randn(4, 8))
    x = torch.randn(3, 8, requires_grad=grad)
    out = torch.full((3, 4), float("nan"))
    assert bnb.matmul(x, state.CB, out=out, state=state) is out
    assert torch.equal(out, bnb.matmul(x, state.CB, state=state))
    assert out.requires_grad is grad
    weight = torch.nn.Parameter(torch.randn(4, 8))
    out = torch.empty(3, 4)
    bnb.matmul(x, weight, out=out).sum().backward()
    assert torch.equal(out, bnb.matmul(x, weight))
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: bnb.matmul(torch.ones(3, 8), w.to(torch.int8)), "B is torch.int8 and would have to be quantized"),
        (lambda w: bnb.matmul(torch.ones(3, 8).double(), w), "x is torch.float64"),
        (lambda w: bnb.matmul(torch.ones(3, 9), w), r"x has shape \[3, 9\]; its last dimension must be 8"),
        (lambda w: bnb.matmul(torch.tensor(1.0), w), "its last dimension must be 8"),
        (lambda w: bnb.matmul(torch.tensor(1.0), w, threshold=1.0), "A has no dimensions"),
        (lambda w: bnb.matmul(torch.ones(3, 8), w, threshold=-2.0), "threshold is -2.0"),
        (lambda w: bnb.matmul(torch.ones(3, 8), w, bias=torch.ones(8)), r"bias has shape \[8\]"),
        (lambda w: bnb.matmul(torch.ones(3, 8), w, out=torch.ones(3, 4).half()), "out for y is torch.float16"),
        (lambda w: bnb.matmul(torch.ones(3, 8), w[0]), "two dimensions"),
        (lambda w: bnb.matmul(torch.ones(3, 8).to("meta"), w), "different devices"),
    ],
)
def test_bad_int8_arguments_are_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call(torch.randn(4, 8))


# ----------------------------------------------------------------------------------------------------------------- MatmulLtState


def test_state_defaults_are_those_of_bitsandbytes():
    state = bnb.MatmulLtState()
    assert (state.is_training, state.has_fp16_weights) == (True, True)
    assert (state.threshold, state.use_pool, state.force_no_igemmlt, state.has_accumulated_gradients) == (0.0, False, False, False)
    for name in ("CB", "SB", "SCB", "SBt", "CBt", "subB", "outlier_pool", "idx"):
        assert getattr(state, name) is None


def test_state_answers_peft_for_python_38():
    assert bnb.MatmulLtState().memory_efficient_backward is False


def test_reset_grads_forgets_the_weight():
    state = inference_state(torch.randn(4, 8), threshold=3.0)
    state.reset_grads()
    assert state.CB is None
    assert state.SCB is None
    assert state.threshold == 3.0


@pytest.mark.parametrize("name", ["CxB", "CxBt", "formatB", "_tile_indices"])
def test_deprecated_attributes_are_none(name):
    with pytest.warns(FutureWarning, match=name) as caught:
        assert getattr(bnb.MatmulLtState(), name) is None
    assert caught[0].filename == __file__


def test_unknown_attributes_do_not_exist():
    with pytest.raises(AttributeError, match="'MatmulLtState' object has no attribute 'CBX'"):
        _ = bnb.MatmulLtState().CBX


def test_outlier_columns_can_be_set():
    state = bnb.MatmulLtState()
    state.idx = torch.tensor([3, 5])
    assert state.idx.tolist() == [3, 5]
    state.idx = None
    assert state.idx is None


def test_states_are_copied_and_pickled():
    state = inference_state(torch.randn(4, 8), threshold=0.5)
    bnb.matmul(torch.randn(3, 8), state.CB, state=state)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(other.CB, state.CB)
        assert torch.equal(other.idx, state.idx)
        assert other.threshold == 0.5


def test_backward_runs_where_forward_ran():
    pytest.importorskip("bnb_reference")
    from bnb_reference import backend as reference

    other = bnb.backends.Backend("other", api_version=(1, 0))
    calls = []

    def relay(op):
        kernel = reference.kernels[op]

        def run(*args, out):
            calls.append(op)
            kernel.function(*args, out=out)

        return run

    import inspect

    for op in ("int8_linear", "int8_linear_transposed", "int8_quantize_rows", "int8_quantize_rows_cols", "int8_matmul"):
        run = relay(op)
        run.__signature__ = inspect.signature(reference.kernels[op].function)
        other.kernel(op, devices={"cpu"}, dtypes=[torch.int8] if op == "int8_matmul" else [torch.float32])(run)
    bnb.backends.register(other)
    weight, x = torch.nn.Parameter(torch.randn(4, 8)), torch.randn(3, 8, requires_grad=True)
    with bnb.use_backend("other"), warnings.catch_warnings():
        warnings.simplefilter("ignore", bnb.backends.BackendFallbackWarning)
        y = bnb.matmul(x, weight)
    forward = list(calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnb.backends.BackendFallbackWarning)
        y.sum().backward()
    assert forward == ["int8_quantize_rows", "int8_linear"]
    assert sorted(calls[2:]) == ["int8_linear_transposed", "int8_matmul", "int8_quantize_rows_cols", "int8_quantize_rows_cols"]
