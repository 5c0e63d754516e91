"""What every backend must pass."""

import pytest

from bnb_core.testing.conformance import *  # noqa: F403


@pytest.fixture(scope="session")
def bnb_backend_name():
    return "neon"


@pytest.fixture
def _clean_backends():
    """Leave the registry alone: the suite changes nothing there, and its tests are too many to look for backends after each."""
