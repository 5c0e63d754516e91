"""Optimizer ops: tensors of any strides, arguments that do not fit, and batches that are checked in full only once."""

import pytest
import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops import Hyperparameters, optimizer_step_8bit_blockwise_, optimizer_step_32bit_
from bnb_core.ops.optimizer import STEP_8BIT, STEP_32BIT, StepBatch, required_states

ADAM = Hyperparameters(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled_weight_decay=True)
SGD = Hyperparameters(momentum=0.9)
CODEBOOK = torch.linspace(-1, 1, 256)


def step32(params, grads, states, algorithm="adam", hyperparameters=ADAM, step=1, lr=0.1):
    states = [*states, *([] for _ in range(3 - len(states)))]
    optimizer_step_32bit_(params, grads, *states, algorithm, hyperparameters, step, lr)


def step8(params, grads, state, absmax, step=1, lr=0.1):
    codebooks = (CODEBOOK, None, None)
    optimizer_step_8bit_blockwise_(params, grads, state, [], [], absmax, [], [], *codebooks, "sgd", SGD, step, lr)


LAYOUTS = {
    "contiguous": lambda: torch.randn(6, 5, 4, 3),
    "channels_last": lambda: torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 6, 3, 4).transpose(0, 1).transpose(2, 3),
    "slice": lambda: torch.randn(6, 9, 4, 3)[:, 2:7],
    "every_other": lambda: torch.randn(6, 5, 4, 6)[..., ::2],
    "one_wide": lambda: torch.randn(3, 4, 5, 6).permute(3, 2, 1, 0),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_32bit_step_does_not_depend_on_strides(layout, grad_layout):
    param, grad = LAYOUTS[layout](), LAYOUTS[grad_layout]()
    states = [torch.randn_like(param), torch.rand_like(grad)]  # strides of one and of the other
    plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (param, grad, *states)]
    step32([param], [grad], [[s] for s in states])
    step32([plain[0]], [plain[1]], [[s] for s in plain[2:]])
    for tensor, expected in zip((param, grad, *states), plain):
        assert torch.equal(tensor, expected)


def test_step_leaves_alone_what_lies_between_the_elements_of_a_slice():
    whole = torch.randn(6, 9)
    before = whole.clone()
    step32([whole[:, 2:7]], [torch.ones(6, 5)], [[torch.zeros(6, 5)], [torch.zeros(6, 5)]])
    assert torch.equal(whole[:, :2], before[:, :2])
    assert torch.equal(whole[:, 7:], before[:, 7:])
    assert not torch.eq(whole[:, 2:7], before[:, 2:7]).any()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_8bit_blocks_run_in_storage_order(order):
    # The same numbers in the same order in storage, as a contiguous tensor and seen with permuted dimensions.
    stored, grad = torch.randn(8, 6, 10, 5), torch.randn(8, 6, 10, 5)
    param = stored.clone().permute(order)
    codes, absmax = torch.zeros(stored.shape, dtype=torch.uint8), torch.zeros(10)
    permuted = torch.zeros_like(codes).permute(order), torch.zeros(10)
    for _ in range(2):
        step8([stored], [grad], [codes], [absmax])
        step8([param], [grad.permute(order).contiguous()], [permuted[0]], [permuted[1]])
    assert torch.equal(param, stored.permute(order))
    assert torch.equal(permuted[0], codes.permute(order))
    assert torch.equal(permuted[1], absmax)


def test_tensors_without_elements_are_passed_over():
    param, empty = torch.ones(3), torch.empty(0, 4)
    states = [[torch.empty(0, 4), torch.zeros(3)], [torch.empty(0, 4), torch.zeros(3)]]
    step32([empty, param], [torch.empty(0, 4), torch.ones(3)], states, lr=1.0)
    assert (param < 1).all()
    step32([empty], [torch.empty(0, 4)], [[torch.empty(0, 4)], [torch.empty(0, 4)]])
    step32([], [], [[], []])


def test_step_and_lr_may_be_tensors():
    params, grad = [torch.ones(5), torch.ones(5)], torch.rand(5)
    states = [[torch.rand(5), torch.rand(5)]]
    states.append([state.clone() for state in states[0]])
    step32(params[:1], [grad], [[states[0][0]], [states[0][1]]], step=7, lr=0.25)
    step32(params[1:], [grad], [[states[1][0]], [states[1][1]]], step=torch.tensor(7.0), lr=torch.tensor(0.25))
    assert torch.equal(*params)


P, G = torch.ones(4), torch.ones(4)
#: What is passed, and what the error says.
MISFITS = {
    "one grad missing": (([P, P], [G], [[P, P], [P, P]]), "2 params and 1 grads"),
    "grad of another dtype": (([P], [G.half()], [[P], [P]]), r"torch.float16 \(gradient\)"),
    "params of two dtypes": (([P, P.half()], [G, G.half()], [[P, P], [P, P]]), r"torch.float16 \(parameter\)"),
    "float64": (([P.double()], [G.double()], [[P], [P]]), "a parameter is torch.float64"),
    "grad of another shape": (([P], [torch.ones(5)], [[P], [P]]), r"shape \[5\], its parameter \[4\]"),
    "state of another shape": (([P], [G], [[torch.ones(5)], [P]]), r"state1 has shape \[5\]"),
    "state of another dtype": (([P], [G], [[P], [P.half()]]), "state2 is torch.float16"),
    "state missing": (([P], [G], [[P]]), "needs state2"),
    "one state missing": (([P, P], [G, G], [[P], [P, P]]), "2 params and 1 tensors in state1"),
    "state too many": (([P], [G], [[P], [P], [P]]), "has no state3"),
    "sparse": (([P], [G.to_sparse()], [[P], [P]]), "has layout torch.sparse_coo"),
    "expanded": (([torch.ones(1).expand(4)], [G], [[P], [P]]), r"strides \[0\] is expanded"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("case", MISFITS)
def test_refuses(case):
    args, message = MISFITS[case]
    with pytest.raises(InvalidArgumentError, match=message):
        step32(*args)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"algorithm": "adamax"}, "no optimizer algorithm 'adamax'; the algorithms are adam, "),
        ({"step": 0}, "step is 0; it counts from 1"),
        ({"step": torch.tensor(1)}, "step is a torch.int64 tensor"),
        ({"lr": torch.ones(1)}, r"lr is a torch.float32 tensor of shape \[1\]"),
    ],
)
def test_refuses_scalars(replaced, message):
    with pytest.raises(InvalidArgumentError, match=message):
        step32([P.clone()], [G], [[P.clone()], [P.clone()]], **replaced)


@pytest.mark.parametrize(
    ("state", "absmax", "message"),
    [
        ([torch.zeros(300)], [torch.zeros(2)], "state1 is torch.float32; it must be torch.uint8"),
        ([torch.zeros(300, dtype=torch.uint8)], [torch.zeros(3)], "absmax has 3 elements"),
        ([torch.zeros(300, dtype=torch.uint8)], [], "1 params and 0 tensors of absmax"),
    ],
)
def test_8bit_refuses(state, absmax, message):
    with pytest.raises(InvalidArgumentError, match=message):
        step8([torch.zeros(300)], [torch.ones(300)], state, absmax)


def test_8bit_needs_a_codebook_for_each_state():
    codes = [torch.zeros(300, dtype=torch.uint8)]
    with pytest.raises(InvalidArgumentError, match="a state without its codebook"):
        optimizer_step_8bit_blockwise_(
            [torch.zeros(300)], [torch.ones(300)], codes, [], [], [torch.zeros(2)], [], [], None, None, None, "sgd", SGD, 1, 0.1
        )


def test_required_states_follow_the_options():
    assert required_states("adam", Hyperparameters()) == (True, True, False)
    assert required_states("adam", Hyperparameters(amsgrad=True)) == (True, True, True)
    assert required_states("ademamix", Hyperparameters()) == (True, True, True)
    assert required_states("sgd", Hyperparameters()) == (False, False, False)
    assert required_states("sgd", Hyperparameters(momentum=0.5)) == (True, False, False)
    assert required_states("rmsprop", Hyperparameters(centered=True)) == (True, False, True)
    assert required_states("rmsprop", Hyperparameters(momentum=0.5)) == (True, True, False)


# ----------------------------------------------------------------------------------------- batches


@pytest.fixture
def full_checks(monkeypatch):
    """Count full checks."""
    counts = []
    meta = STEP_32BIT.meta
    monkeypatch.setattr(STEP_32BIT, "meta", lambda *args: (counts.append(1), meta(*args))[1])
    return counts


def batch_of(params):
    return StepBatch(STEP_32BIT, params, ([torch.zeros_like(p) for p in params], [], []))


def take(batch, grads):
    batch.step(grads, "sgd", SGD, 2, 0.5)


def test_batch_is_checked_in_full_once(full_checks):
    params = [torch.ones(3), torch.ones(2, 2).t()]
    batch = batch_of(params)
    for _ in range(3):
        take(batch, [torch.ones(3), torch.ones(2, 2).t()])
    assert len(full_checks) == 1
    expected = 1 - 0.5 * (1 + 1.9 + 2.71)
    torch.testing.assert_close(params, [torch.full((3,), expected), torch.full((2, 2), expected)])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.ones(5), "a gradient has shape"),
        (torch.ones(4).half(), "gradient"),
        (torch.ones(4).to_sparse(), "has layout torch.sparse_coo"),
        (torch.ones(2, 2), "a gradient has shape"),
    ],
    ids=["shape", "dtype", "sparse", "dimensions"],
)
def test_batch_refuses_what_it_would_have_refused_at_first(grad, message):
    batch = batch_of([torch.ones(4)])
    take(batch, [torch.ones(4)])
    with pytest.raises(InvalidArgumentError, match=message):
        take(batch, [grad])


def test_batch_takes_gradients_of_other_strides_later(full_checks):
    param = torch.zeros(3, 4)
    batch = batch_of([param])
    take(batch, [torch.zeros(3, 4)])
    grad = torch.randn(4, 3).t()
    take(batch, [grad])
    assert torch.equal(param, -0.5 * grad)
    assert len(full_checks) == 2


@pytest.mark.parametrize(
    "replace",
    [lambda p: p.half(), lambda p: torch.zeros(8)[::2], lambda p: torch.zeros(5)],
    ids=["dtype", "strides", "size"],
)
def test_batch_sees_that_the_data_of_a_parameter_was_replaced(replace):
    params = [torch.zeros(4), torch.zeros(4)]
    batch = batch_of(params)
    take(batch, [torch.ones(4), torch.ones(4)])
    assert batch.is_current()
    params[1].data = replace(params[1])
    assert not batch.is_current()


@pytest.mark.parametrize("moved", ["params", "states"])
def test_batch_sees_that_tensors_were_moved(moved):
    # `.data = ` to another device needs a second one; here the list shows what it would show then.
    tensors = {"params": [torch.zeros(4)], "states": [torch.zeros(4)]}
    batch = StepBatch(STEP_32BIT, tensors["params"], (tensors["states"], [], []))
    assert batch.is_current()
    tensors[moved][0] = torch.zeros(4, device="meta")
    assert not batch.is_current()


def test_batch_of_8bit_states():
    param, codes, absmax = torch.zeros(300), torch.zeros(300, dtype=torch.uint8), torch.zeros(2)
    batch = StepBatch(STEP_8BIT, [param], ([codes], [], [], [absmax], [], [], CODEBOOK, None, None))
    for _ in range(2):
        batch.step([torch.ones(300)], "sgd", SGD, 1, 1.0)
    assert (param == -2).all()
    assert (absmax == 1).all()
