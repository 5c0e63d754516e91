"""What the installed torch says about CUDA."""

import dataclasses
from typing import List, Optional, Tuple

import torch


@dataclasses.dataclass(frozen=True)
class CUDASpecs:
    """The GPUs that there are, and the version of CUDA, or of ROCm, that torch is built with."""

    highest_compute_capability: Tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: Tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the GPU multiplies int8 matrices in hardware; sm_72, of Jetson Xavier, is NVIDIA's first that does."""
        return bool(torch.version.hip) or self.highest_compute_capability >= (7, 2)


def get_compute_capabilities() -> List[Tuple[int, int]]:
    """Return the compute capability of each GPU, in ascending order."""
    return sorted(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))


def get_cuda_version_tuple() -> Optional[Tuple[int, int]]:
    """Return major and minor version of CUDA, or of ROCm; None where torch is built with neither."""
    version = torch.version.cuda or torch.version.hip
    if not version:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> Optional[str]:
    """Return the version without the dot, such as "124"."""
    version = get_cuda_version_tuple()
    return None if version is None else "{}{}".format(*version)


def get_cuda_specs() -> Optional[CUDASpecs]:
    """Return what there is; None without a GPU."""
    version = get_cuda_version_tuple()
    if version is None or not torch.cuda.is_available():
        return None
    return CUDASpecs(get_compute_capabilities()[-1], "{}{}".format(*version), version)
