"""Stand-ins for what is bitsandbytes' own C library: they can be looked up, as clients do at import, but not called."""

from typing import Any, Callable

import torch

from bnb_core.errors import NotProvidedError

HIP_ENVIRONMENT = bool(torch.version.hip)
BNB_BACKEND = "CPU" if not torch.cuda.is_available() else "ROCm" if HIP_ENVIRONMENT else "CUDA"
ROCM_GPU_ARCH = "unknown"  # no kernel here is chosen by it


def not_provided(name: str, instead: str) -> Callable[..., Any]:
    """Return a function that raises `NotProvidedError`.

    Args:
        name: the function that bitsandbytes has.
        instead: what to do without it.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotProvidedError(f"bitsandbytes.{name} is not provided by bnb_core; {instead}")

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    return refuse


class BNBNativeLibrary:
    """In place of the loaded C library. It has every function by name; each raises `NotProvidedError` when it is called."""

    compiled_with_cuda = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # a protocol that Python asks for, not a function of the library
            raise AttributeError(name)
        return not_provided(f"functional.lib.{name}", "its kernels belong to backends: call the functions of bnb_core.functional")

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return getattr(self, name)


lib = BNBNativeLibrary()
