"""Training with 8-bit states comes out where 32-bit states do."""

import pytest
import torch

from bnb_core import optim


def train(cls, lr, steps=150, **options):
    """Fit a small network to a fixed random function; return the loss before and after."""
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    y = torch.tanh(x @ torch.randn(32, 8)) + 0.1 * torch.randn(256, 8)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    optimizer = cls(model.parameters(), lr=lr, **options)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    formats = {state["state1"].dtype for state in optimizer.state.values()}
    return losses[0], losses[-1], formats


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"lr": 2e-3}),
        ("Lion", {"lr": 5e-4}),
        ("AdEMAMix", {"lr": 1e-3}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("RMSprop", {"lr": 1e-3}),
        ("Adagrad", {"lr": 2e-2}),
    ],
)
def test_8bit_states_train_as_well(name, options):
    options["min_8bit_size"] = 1024
    start, full, formats = train(getattr(optim, name), **options)
    assert formats == {torch.float32}
    _, small, formats = train(getattr(optim, name + "8bit"), **options)
    assert formats == {torch.float32, torch.uint8}  # weights, and biases
    assert full < 0.5 * start
    assert small == pytest.approx(full, rel=0.1, abs=0.02 * start)
