"""What every backend must pass."""

from bnb_core.testing.conformance import *  # noqa: F403
