"""The exception that a failure of CUDA becomes."""

from __future__ import annotations

from bnb_core.errors import BackendError


class CudaError(BackendError):
    """The CUDA driver refused or failed a call. The message names the op, the device and the driver's reason.

    A kernel's failure shows at a later call on its device, since kernels run while Python goes on. `CUDA_LAUNCH_BLOCKING=1`
    makes it show at the right one.
    """
