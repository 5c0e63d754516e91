"""Whether the backend can run on this machine, and what it found there. Makes no CUDA context."""

from __future__ import annotations

from bnb_core.backends import YES, Support
from bnb_core.errors import BackendUnavailableError
from bnb_cuda_jetson import _native


def available() -> Support:
    """Say whether there is a driver, and a device that the device code of this package runs on."""
    try:
        devices = [_native.device(ordinal) for ordinal in range(_native.device_count())]
    except BackendUnavailableError as error:
        return Support(False, str(error))
    if any(device.architecture for device in devices):
        return YES
    if not devices:
        return Support(False, "the NVIDIA driver finds no device")
    found = ", ".join(f"{device.name} ({_dotted(device.compute_capability)})" for device in devices)
    built = ", ".join(map(_dotted, _native.architectures()))
    return Support(False, f"no device has a compute capability that this package has code for ({built}): {found}")


def describe() -> str:
    """Name the devices and the architectures that there is code for."""
    try:
        names = [_native.device(ordinal).name for ordinal in range(_native.device_count())]
    except BackendUnavailableError:
        names = []
    built = ", ".join(f"sm_{architecture}" for architecture in _native.architectures())
    return f"{', '.join(names) or 'no CUDA device'}; device code for {built}"


def _dotted(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"
