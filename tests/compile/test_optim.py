"""Steps called from compiled code: traced if the optimizer is capturable, else left to the interpreter; compiled twice at most."""

import copy

import pytest
import torch

from bnb_core import optim
from bnb_core.ops.plain import REGISTERED

pytestmark = pytest.mark.skipif(not REGISTERED, reason="this torch has no torch.compile, or an early one")


@pytest.fixture
def compiles():
    """Count graphs, by a backend for torch.compile that runs them as they are."""
    import torch._dynamo

    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield count, graphs
    torch._dynamo.reset()


def train(step, optimizer, model, scheduler=None):
    """Train, and return how many frames dynamo had compiled after each step."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    frames = []
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 80)).square().sum().backward()
        step()
        if scheduler is not None:
            scheduler.step()
        frames.append(counters["frames"]["total"])
    return frames


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.Lion, optim.AdEMAMix8bit])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_nothing_is_compiled_after_the_second_step(cls, scheduled, capturable, compiles):
    backend, graphs = compiles
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Linear(80, 60)
        optimizer = cls(model.parameters(), lr=1e-2, capturable=capturable)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled else None
        step = torch.compile(lambda: optimizer.step(), backend=backend) if compiled else optimizer.step  # noqa: B023
        frames = train(step, optimizer, model, scheduler)
        results.append(model.weight.detach())
    assert torch.equal(*results)
    # The first step makes the states outside of graphs; what comes after may be compiled then, and anew as part of the whole.
    assert (0 < len(graphs) <= 2) if capturable else graphs == []
    assert 0 < frames[1] == frames[-1]


@pytest.mark.filterwarnings("ignore:Profiler record function")
@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit, optim.Lion8bit, optim.SGD8bit, optim.AdEMAMix8bit])
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_one_graph_for_all_steps(cls, mode):
    """With a learning rate that changes in place, and no graph breaks."""
    from torch._dynamo.testing import CompileCounterWithBackend

    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(80, 60), torch.nn.Linear(60, 3)).bfloat16()
        frozen = torch.nn.Parameter(torch.randn(3))
        optimizer = cls([*model.parameters(), frozen], lr=1e-2, capturable=True, weight_decay=0.1, min_8bit_size=1000)
        counter = CompileCounterWithBackend(mode)
        step = torch.compile(optimizer.step, backend=counter, fullgraph=True) if compiled else optimizer.step
        for index in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 80).bfloat16()).square().sum().backward()
            (step if index else optimizer.step)()
            optimizer.param_groups[0]["lr"].mul_(0.9)
        assert float(optimizer.state[model[0].weight]["step"]) == 6
        results.append([parameter.detach() for parameter in model.parameters()])
    assert counter.frame_count == 1
    for eager, traced in zip(*results):
        assert torch.equal(eager, traced)


@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_states_that_are_loaded_after_compiling(compiles):
    backend, _ = compiles
    model = torch.nn.Linear(8, 8)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])

    def train(step):
        for part, state in zip((model, optimizer), saved):
            part.load_state_dict(state)
        for seed in range(3):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            step()
        saved[:] = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        return model.weight.detach().clone()

    compiled = torch.compile(optimizer.step, backend=backend)
    begin = copy.deepcopy(saved)
    results = [train(compiled), train(compiled)]
    saved[:] = begin
    assert all(map(torch.equal, results, [train(optimizer.step), train(optimizer.step)]))
    assert int(optimizer.state[model.weight]["step"]) == 6


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_step_within_a_compiled_function(compiles):
    backend, graphs = compiles
    model = torch.nn.Linear(8, 8)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)

    @torch.compile(backend=backend)
    def step_and_measure(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x = torch.randn(4, 8)
    losses = [float(step_and_measure(x).detach()) for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert int(optimizer.state[model.weight]["step"]) == 6
    assert len(graphs) <= 6  # a few for the parts of the function, and none for each step


def test_compiled_closure(compiles):
    backend, graphs = compiles
    model = torch.nn.Linear(8, 8)
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    forward = torch.compile(model, backend=backend)
    x = torch.randn(4, 8)

    def closure():
        optimizer.zero_grad()
        loss = forward(x).square().mean()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert len(graphs) == 1
