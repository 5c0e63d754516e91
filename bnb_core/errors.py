"""The exceptions that bnb_core raises: one tree, so that `except BnbError` catches all of them."""

from __future__ import annotations


class BnbError(Exception):
    """Base of every error that bnb_core raises on purpose."""


class InvalidArgumentError(BnbError, ValueError):
    """An argument has a value, dtype, shape or device that the function does not take."""


class ConfigurationError(BnbError, ValueError):
    """A `BNB_*` environment variable, or a call that sets the same, has a value that is not accepted."""


class BackendError(BnbError, RuntimeError):
    """Base of the errors about backends."""


class BackendNotFoundError(BackendError, LookupError):
    """No backend of that name is installed."""


class BackendLoadError(BackendError):
    """A backend that was asked for could not be imported, or does not follow the backend API."""


class BackendUnavailableError(BackendError):
    """A backend that was asked for is installed but cannot run on this machine."""


class BackendDefinitionError(BackendError, TypeError):
    """A backend declares a kernel that does not fit the op that it names."""


class OpNotSupportedError(BackendError, NotImplementedError):
    """No selected backend runs this op on this device and dtype."""


class CheckpointError(BnbError, ValueError):
    """A saved quantized state is incomplete, inconsistent or not of this format."""


class CaptureError(BnbError, RuntimeError):
    """A call cannot be captured in a CUDA graph, because a replay would not do the same."""
