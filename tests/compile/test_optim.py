"""Steps called from compiled code: torch.compile leaves them to the interpreter, and does not compile anew for each."""

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
    assert graphs == []
    assert 0 < frames[1] == frames[-1]


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
