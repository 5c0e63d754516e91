"""The step loop: options and groups, schedulers, what is grouped into one call, closures, copies, and what is refused."""

import copy
import gc
import io
import math
import pickle
import warnings
from argparse import Namespace

import pytest
import torch
from torch.optim import lr_scheduler

from bnb_core import backends, optim
from bnb_core.backends import Backend
from bnb_core.errors import CaptureError, InvalidArgumentError
from bnb_core.ops import Hyperparameters
from bnb_core.ops.plain import REGISTERED

EVERY_CLASS = [cls for cls in vars(optim).values() if isinstance(cls, type) and issubclass(cls, optim.Optimizer)]
EVERY_CLASS.remove(optim.Optimizer)


def parameters(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give_gradients(params):
    for param in params:
        param.grad = torch.randn_like(param)


def create(cls, params, **options):
    if issubclass(cls, (optim.SGD, optim.LARS)):
        options = {"lr": 0.1, "momentum": 0.9, **options}
    return cls(params, **options)


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of ops, in a backend that only changes parameters by lr."""
    recorded = []
    backend = Backend("recorder", api_version=(1, 0))
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @backend.kernel("optimizer_step_32bit_", devices={"cpu"}, dtypes=dtypes)
    def step_32bit(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr):
        recorded.append((32, params, algorithm, hyperparameters, step, lr))

    @backend.kernel("optimizer_step_8bit_blockwise_", devices={"cpu"}, dtypes=dtypes)
    def step_8bit(
        params, grads, state1, state2, state3, absmax1, absmax2, absmax3, codebook1, codebook2, codebook3,
        algorithm, hyperparameters, step, lr, blocksize,
    ):  # fmt: skip
        recorded.append((8, params, algorithm, hyperparameters, step, lr))

    backends.register(backend)
    backends.set_backend("recorder")
    return recorded


# ---------------------------------------------------------------------------- grouping and options


def test_one_call_for_all_parameters_of_a_dtype_format_and_group(calls):
    small, large, half = parameters((10,), (3, 7)), parameters((70, 70), (4096,)), parameters((5,), (9,), dtype=torch.bfloat16)
    optimizer = optim.AdamW8bit([{"params": small + large + half}, {"params": parameters((8,)), "weight_decay": 0.5}])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    give_gradients(params)
    optimizer.step()
    assert [(bits, [tuple(p.shape) for p in group]) for bits, group, *_ in calls] == [
        (32, [(10,), (3, 7)]),
        (8, [(70, 70), (4096,)]),
        (32, [(5,), (9,)]),
        (32, [(8,)]),
    ]
    assert [hyperparameters.weight_decay for _, _, _, hyperparameters, *_ in calls] == [0.01, 0.01, 0.01, 0.5]
    assert {step for *_, step, _ in calls} == {1}


def test_parameters_of_equal_step_share_a_call_and_others_do_not(calls):
    a, b, c = parameters((3,), (4,), (5,))
    optimizer = optim.Adam([a, b, c])
    for stepping in ([a, b], [a, b, c], [b, c], [a, c], [a, b, c]):
        optimizer.zero_grad(set_to_none=True)
        give_gradients(stepping)
        optimizer.step()
    taken = [({len(p) for p in params}, step) for _, params, _, _, step, _ in calls]
    assert taken == [
        ({3, 4}, 1),
        *[({3, 4}, 2), ({5}, 1)],
        *[({4}, 3), ({5}, 2)],
        ({3, 5}, 3),
        *[({3, 4, 5}, 4)],
    ]
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == [4, 4, 4]


def test_equal_counts_do_not_drag_others_along():
    a, b, idle = parameters((3,), (4,), (5,))
    optimizer = optim.Adam([a, b, idle])
    for stepping in ([a, idle], [b], [a, b]):  # at the end a and b have come to the same count, which `idle` has too
        optimizer.zero_grad(set_to_none=True)
        give_gradients(stepping)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (a, b, idle)] == [2, 2, 1]


def test_states_may_be_replaced_by_hand():
    (param,) = parameters((10,))
    optimizer = optim.Adam([param], lr=0.5)
    param.grad = torch.ones(10)
    optimizer.step()
    saved = {key: value.clone() for key, value in optimizer.state[param].items()}
    optimizer.step()
    expected = param.detach().clone()
    with torch.no_grad():
        param.add_(0.5)
    optimizer.state[param] = saved
    optimizer.step()
    torch.testing.assert_close(param.detach(), expected)
    assert int(saved["step"]) == 2
    optimizer.state.clear()
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == 1
    optimizer.state[param]["state1"] = torch.zeros(10)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["state1"], torch.full((10,), 0.1))


def test_states_may_be_removed_by_hand():
    params = parameters((10,), (10,))
    give_gradients(params)
    optimizer = optim.AdamW(params, lr=0.1)
    optimizer.step()
    del optimizer.state[params[1]]
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [2, 1]
    last = optimizer.state[params[1]]
    last.pop([*last][-1])
    optimizer.step()
    assert {*last} == {*optimizer.state[params[0]]}


def test_a_parameter_without_elements_takes_no_part():
    empty, param = parameters((0, 3), (4,))
    optimizer = optim.AdamW8bit([empty, param])
    give_gradients([empty, param])
    optimizer.step()
    assert list(optimizer.state) == [param]


def test_nothing_to_do_without_gradients(calls):
    optimizer = optim.Adam(parameters((3,)))
    optimizer.step()
    assert calls == []
    assert len(optimizer.state) == 0


def test_options_are_read_at_every_step(calls):
    params = parameters((3,))
    optimizer = optim.AdamW(params, lr=0.5, betas=(0.8, 0.9), weight_decay=0.25)
    give_gradients(params)
    optimizer.step()
    optimizer.param_groups[0].update(lr=0.125, betas=(0.5, 0.75), weight_decay=0.0)
    optimizer.args.skip_zeros = True
    optimizer.step()
    (*_, before, _, first), (*_, after, _, second) = calls
    assert (first, before.beta1, before.beta2, before.weight_decay, before.skip_zeros) == (0.5, 0.8, 0.9, 0.25, False)
    assert (second, after.beta1, after.beta2, after.weight_decay, after.skip_zeros) == (0.125, 0.5, 0.75, 0.0, True)


def test_kernels_get_numbers_of_the_types_that_the_spec_gives(calls):
    params = parameters((3,))
    optimizer = optim.SGD(params, lr=1, momentum=1, weight_decay=0)
    give_gradients(params)
    for _ in range(2):
        optimizer.step()
        (*_, hyperparameters, step, lr) = calls[-1]
        assert list(map(type, hyperparameters)) == list(map(type, Hyperparameters()))
        assert (type(step), type(lr)) == (int, float)


def test_options_may_be_set_for_a_group(calls):
    first, second = parameters((100,), (100,))
    groups = [{"params": first}, {"params": second, "optim_bits": 8, "min_8bit_size": 50, "max_unorm": 0.5, "lr": 0.2}]
    optimizer = optim.Lion(groups)
    give_gradients([first, second])
    optimizer.step()
    assert [(bits, hyperparameters.max_unorm, lr) for bits, _, _, hyperparameters, _, lr in calls] == [
        (32, 0.0, 1e-4),
        (8, 0.5, 0.2),
    ]


def test_args_takes_the_place_of_arguments():
    args = Namespace(optim_bits=8, min_8bit_size=0, max_unorm=0.0, skip_zeros=True)
    params = parameters((300,))
    optimizer = optim.Adam(params, args=args, optim_bits=32, min_8bit_size=4096)
    params[0].grad = torch.zeros(300)
    before = params[0].detach().clone()
    optimizer.step()
    assert optimizer.args is args
    assert optimizer.state[params[0]]["state1"].dtype == torch.uint8
    assert torch.equal(params[0], before)
    with pytest.raises(InvalidArgumentError, match="args has no max_unorm, skip_zeros"):
        optim.Adam(params, args=Namespace(optim_bits=8, min_8bit_size=0))


def test_states_needed_later_are_made_then():
    params = parameters((5000,))
    optimizer = optim.AdamW8bit(params)
    give_gradients(params)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert "state3" not in state
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.step()
    assert state["state3"].dtype == torch.uint8
    assert state["absmax3"].min() > 0


@pytest.mark.parametrize("size", [4095, 4096])
def test_small_parameters_have_32bit_states(size):
    params = parameters((size,))
    optimizer = optim.Adam8bit(params)
    give_gradients(params)
    optimizer.step()
    assert optimizer.state[params[0]]["state1"].dtype == (torch.float32 if size < 4096 else torch.uint8)


def test_add_param_group_later():
    first, second = parameters((10,), (12,))
    optimizer = optim.Adam([first], lr=0.1)
    give_gradients([first])
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.3})
    give_gradients([first, second])
    before = second.detach().clone()
    optimizer.step()
    torch.testing.assert_close((second - before).abs(), torch.full((12,), 0.3))
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [2, 1]


def test_parameters_exchanged_in_a_group():
    first, second = parameters((10,), (10,))
    optimizer = optim.Adam([first], lr=0.1)
    for param in (first, second):
        optimizer.param_groups[0]["params"][0] = param
        give_gradients([param])
        before = param.detach().clone()
        optimizer.step()
        torch.testing.assert_close((param - before).abs(), torch.full((10,), 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "AdamW: lr is -1.0; it must be at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\); there must be 2, each at least 0 and below 1"),
        ({"betas": (0.9,)}, r"betas are \(0.9,\)"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas are \(0.9, 0.99, 0.999\)"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"optim_bits": 16}, "optim_bits is 16; it must be 32 or 8"),
        ({"min_8bit_size": -1}, "min_8bit_size is -1"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        optim.AdamW(parameters((3,)), **options)
    good = optim.AdamW(parameters((3,)))
    if "optim_bits" not in options and "min_8bit_size" not in options:
        with pytest.raises(InvalidArgumentError, match=message):
            good.add_param_group({"params": parameters((3,)), **options})
        assert len(good.param_groups) == 1


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(options):
    for cls in (optim.SGD, optim.LARS8bit, optim.PytorchLARS):
        with pytest.raises(InvalidArgumentError, match="nesterov with momentum"):
            cls(parameters((3,)), lr=0.1, nesterov=True, **options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int32])
def test_refuses_parameters_of_other_dtypes_that_are_trained(dtype):
    param = torch.zeros(3, dtype=dtype)
    optim.Adam([param])  # not trained: it never has a gradient
    if dtype.is_floating_point or dtype.is_complex:
        with pytest.raises(InvalidArgumentError, match=f"is {dtype}; it must be torch.float32"):
            optim.Adam([param.requires_grad_()])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_refuses_sparse_gradients():
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = optim.AdamW8bit(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InvalidArgumentError, match=r"grads\[0\] has layout torch.sparse_coo"):
        optimizer.step()


# -------------------------------------------------------------------------- closures, hooks, modes


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([param], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert torch.equal(param, torch.zeros(3))
    assert optimizer.step() is None


@pytest.mark.skipif(not REGISTERED, reason="this torch has no FakeTensorMode that covers the ops")
def test_fake_parameters():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        params = parameters((5000,), (3,))
        optimizer = optim.AdamW8bit(params)
        give_gradients(params)
        optimizer.step()
        optimizer.step()
        assert optimizer.state[params[0]]["state1"].dtype == torch.uint8


# -------------------------------------------------------------------------------------- schedulers


def run_with(make_scheduler, cls=optim.AdamW, **options):
    """Return the options that each of six steps was taken with."""
    params = parameters((4,))
    optimizer = create(cls, params, **options)
    scheduler = make_scheduler(optimizer)
    seen = []
    for _ in range(6):
        give_gradients(params)
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), group.get("betas"), group.get("momentum")))
        optimizer.step()
        scheduler.step()
    return seen


def test_lambda_lr(calls):
    expected = [0.1 * 0.5**i for i in range(6)]
    seen = run_with(lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch), lr=0.1)
    assert [lr for lr, *_ in seen] == pytest.approx(expected)
    assert [lr for *_, lr in calls] == pytest.approx(expected)


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.Lion, optim.AdEMAMix])
def test_one_cycle_cycles_the_first_beta(cls, calls):
    if cls is optim.AdEMAMix and not REGISTERED:
        pytest.skip("this torch's OneCycleLR takes no more than two betas")
    seen = run_with(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=7), cls)
    assert len({betas[0] for _, betas, _ in seen}) > 4
    assert [hyperparameters.beta1 for _, _, _, hyperparameters, *_ in calls] == [betas[0] for _, betas, _ in seen]
    assert len({betas[1:] for _, betas, _ in seen}) == 1


@pytest.mark.parametrize("cls", [optim.SGD, optim.LARS8bit, optim.RMSprop])
def test_one_cycle_cycles_momentum(cls, calls):
    seen = run_with(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=7), cls)
    assert len({momentum for _, _, momentum in seen}) > 4
    assert [hyperparameters.momentum for _, _, _, hyperparameters, *_ in calls] == [momentum for _, _, momentum in seen]


# -------------------------------------------------------------------------------- strides, layouts


def test_training_does_not_depend_on_memory_format():
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(8, 16, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    optimizers = [optim.AdamW(model.parameters(), lr=0.1) for model in (plain, last)]
    for _ in range(3):
        x = torch.randn(2, 8, 6, 6)
        for model, optimizer in zip((plain, last), optimizers):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert not last.weight.is_contiguous()
    assert optimizers[1].state[last.weight]["state1"].stride() == last.weight.stride()
    torch.testing.assert_close(plain.weight, last.weight, rtol=1e-4, atol=1e-5)


def test_model_may_change_its_dtype_between_steps():
    model = torch.nn.Linear(80, 60)
    optimizer = optim.AdamW8bit(model.parameters(), lr=0.25)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        optimizer.zero_grad(set_to_none=True)
        before = model.bias.detach().clone().float()
        model(torch.ones(1, 80, dtype=dtype)).sum().backward()
        optimizer.step()
        torch.testing.assert_close((before - model.bias.detach().float()).abs(), torch.full((60,), 0.25), rtol=0.02, atol=0.02)
    assert optimizer.state[model.bias]["state1"].dtype == torch.float32
    assert int(optimizer.state[model.weight]["step"]) == 3


def test_expanded_parameter_is_refused():
    param = torch.nn.Parameter(torch.zeros(1).expand(4))
    param.grad = torch.ones(4)
    with pytest.raises(InvalidArgumentError, match="is expanded"):
        optim.Adam([param]).step()


# ------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("cls", EVERY_CLASS)
@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "torch.save"])
def test_a_copy_continues_like_the_original(cls, copied):
    params = parameters((300, 20), (7,))
    optimizer = create(cls, params)
    for _ in range(3):
        give_gradients(params)
        optimizer.step()
    if copied == "torch.save":
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False) if REGISTERED else torch.load(buffer)
    else:
        twin = copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    twins = twin.param_groups[0]["params"]
    give_gradients(params)
    for param, other in zip(params, twins):
        assert other is not param
        other.grad = param.grad.clone()
    optimizer.step()
    twin.step()
    for param, other in zip(params, twins):
        assert torch.equal(param, other)
    assert twin.is_paged == optimizer.is_paged
    assert vars(twin.args) == vars(optimizer.args)
    assert len({id(twin.state[p]["step"]) for p in twins}) == 1


def test_optimizer_does_not_outlive_its_last_reference():
    import weakref

    params = parameters((5000,))
    optimizer = optim.AdamW8bit(params)
    give_gradients(params)
    optimizer.step()
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None


# ------------------------------------------------------------------------------- paged, capturable


@pytest.mark.parametrize("cls", [optim.PagedAdamW8bit, optim.PagedLion, optim.PagedAdEMAMix32bit])
def test_paged_states_on_the_cpu_are_ordinary_and_quiet(cls):
    params = parameters((400, 400))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    base = {"PagedAdamW8bit": optim.AdamW8bit, "PagedLion": optim.Lion, "PagedAdEMAMix32bit": optim.AdEMAMix32bit}[cls.__name__]
    paged, plain = cls(params), base(twins)
    assert paged.is_paged
    assert not plain.is_paged
    give_gradients(params)
    twins[0].grad = params[0].grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paged.step()
    plain.step()
    assert torch.equal(params[0], twins[0])


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_ten_capturable_steps_equal_ten_others(cls):
    ours = parameters((80, 60), (7,))
    others = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    capturable, plain = create(cls, ours, lr=0.1, capturable=True), create(cls, others, lr=0.1)
    lr = capturable.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor)
    for i in range(10):
        give_gradients(ours)
        for p, q in zip(ours, others):
            q.grad = p.grad.clone()
        lr.fill_(0.1 / (i + 1))
        plain.param_groups[0]["lr"] = float(lr)
        capturable.step()
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, others)), i
    steps = [capturable.state[p]["step"] for p in ours]
    assert steps[0] is steps[1]
    assert steps[0] == 10
    assert steps[0].dtype == torch.float32


def test_capturable_passes_tensors_and_keeps_them(calls):
    params = parameters((3,), (4,))
    optimizer = optim.AdamW(params, capturable=True)
    pointers = set()
    for _ in range(3):
        give_gradients(params)
        optimizer.step()
        (*_, step, lr) = calls[-1]
        pointers.add((step.data_ptr(), lr.data_ptr()))
    assert len(pointers) == 1
    assert step.shape == lr.shape == ()
    optimizer.param_groups[0]["lr"] = 0.25  # as schedulers of older torch do
    optimizer.step()
    assert calls[-1][-1].item() == 0.25


def test_capturable_states_that_stop_stepping_together_are_counted_apart():
    a, b = parameters((3,), (4,))
    optimizer = optim.Adam([a, b], capturable=True)
    give_gradients([a, b])
    optimizer.step()
    assert optimizer.state[a]["step"] is optimizer.state[b]["step"]
    b.grad = None
    optimizer.step()
    assert (optimizer.state[a]["step"].item(), optimizer.state[b]["step"].item()) == (2.0, 1.0)


@pytest.fixture
def capture(monkeypatch):
    """Have torch say that a CUDA graph is being captured."""

    def begin():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    return begin


def test_capture_needs_capturable(capture):
    params = parameters((3,))
    optimizer = optim.Adam(params)
    give_gradients(params)
    optimizer.step()
    capture()
    with pytest.raises(CaptureError, match=r"Adam\.step: capturable is False while a CUDA graph is captured"):
        optimizer.step()


def test_capture_needs_a_learning_rate_in_a_tensor(capture):
    params = parameters((3,))
    optimizer = optim.Adam(params, capturable=True)
    give_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    capture()
    with pytest.raises(CaptureError, match=r"lr is the number 0.5"):
        optimizer.step()


def test_capture_needs_a_step_before_it(capture):
    a, b = parameters((3,), (4,))
    optimizer = optim.Adam([a, b], capturable=True)
    give_gradients([a])
    optimizer.step()
    capture()
    optimizer.step()
    give_gradients([b])
    with pytest.raises(CaptureError, match="take a step before the capture"):
        optimizer.step()
