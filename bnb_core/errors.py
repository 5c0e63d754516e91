"""The exceptions that bnb_core raises: one tree, so that `except BnbError` catches all of them."""

from __future__ import annotations

from typing import Tuple


class BnbError(Exception):
    """Base of every error that bnb_core raises on purpose."""


class InvalidArgumentError(BnbError, ValueError):
    """An argument has a value, dtype, shape or device that the function does not take."""


class MissingParameterError(InvalidArgumentError, AttributeError):
    """A module has no parameter of the name that is given."""


class ParameterTypeError(InvalidArgumentError, TypeError):
    """What is named as a module's parameter is something else."""


class ConfigurationError(BnbError, ValueError):
    """A `BNB_*` environment variable, or a call that sets the same, has a value that is not accepted."""


class BackendError(BnbError, RuntimeError):
    """Base of the errors about backends."""


class BackendNotFoundError(BackendError, LookupError):
    """No backend of that name is installed."""


class BackendLoadError(BackendError):
    """A backend that was asked for could not be imported, or does not follow the backend API."""


class BackendIncompatibleError(BackendLoadError):
    """A backend is written for a version of the backend API, `api_version`, that this bnb_core does not provide."""

    def __init__(self, message: str, api_version: Tuple[int, int]) -> None:
        super().__init__(message, api_version)
        self.api_version = api_version

    def __str__(self) -> str:
        return str(self.args[0])


class BackendUnavailableError(BackendError):
    """A backend that was asked for is installed but cannot run on this machine."""


class BackendDefinitionError(BackendError, TypeError):
    """A backend declares a kernel that does not fit the op that it names."""


class OpNotSupportedError(BackendError, NotImplementedError):
    """No selected backend runs this op on this device and dtype."""


class NotQuantizedError(BnbError, RuntimeError):
    """A module is called whose weight has not been quantized yet."""


class CheckpointError(BnbError, ValueError):
    """A saved quantized state is incomplete, inconsistent or not of this format."""


class StorageError(BnbError, OSError):
    """A file cannot be read or written: no space is left, or permission is lacking."""


class CaptureError(BnbError, RuntimeError):
    """A call cannot be captured in a CUDA graph, because a replay would not do the same."""


class NotProvidedError(BnbError, NotImplementedError):
    """Something of bitsandbytes that bnb_core has on purpose not, such as a handle of its C library, is used."""


class InstalledBitsandbytesError(BnbError, RuntimeError):
    """The real bitsandbytes is where its name is to mean bnb_core."""
