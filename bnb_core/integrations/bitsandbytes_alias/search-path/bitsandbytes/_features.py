"""What the package can do, as clients ask for it before they use it."""

import sys
from typing import Set


def features() -> Set[str]:
    """Return {"multi_backend"}: transformers and accelerate look here whether a GPU other than NVIDIA's, or none, will do.

    transformers for Python 3.8 then asks for Intel's extension of PyTorch, without which bitsandbytes did not run on CPUs at that
    time. Where there is neither that nor a GPU, it fails with "'frozenset' object has no attribute 'discard'", so it is told yes.
    """
    transformers = sys.modules.get("transformers.integrations.bitsandbytes")
    if hasattr(transformers, "is_ipex_available"):
        vars(transformers)["is_ipex_available"] = lambda: True
    return {"multi_backend"}
