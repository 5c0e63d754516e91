"""A backend of bnb-core that runs two ops in numpy."""

from bnb_numpy.backend import backend, bnb_backends

__version__ = "0.1.0"

__all__ = ["backend", "bnb_backends"]
