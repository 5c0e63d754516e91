"""Fixtures for every test of the repository."""

import pytest


@pytest.fixture(autouse=True)
def _reproducible():
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed also formats a stack for each accelerator that is not used
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def _clean_backends(monkeypatch):
    """Give each test the default selection, and take back what it registered or set."""
    from bnb_core import backends
    from bnb_core.backends.discovery import registry

    before = registry._registered
    yield
    registry._registered = before
    backends.set_backend()
    monkeypatch.undo()
    backends.refresh()
    backends.reset_fallbacks()
