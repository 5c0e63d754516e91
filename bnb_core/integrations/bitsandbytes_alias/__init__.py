"""Make `import bitsandbytes` mean bnb_core, for programs and libraries that import it by that name.

The folder `search-path` beside this file holds a package `bitsandbytes` and the metadata of a distribution of that name. Being on
`sys.path` is all that it takes: there are no import hooks, and child processes find it too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

from bnb_core.errors import InstalledBitsandbytesError

#: What goes on `sys.path`. The name is no identifier, so the modules in it have no other name than the one that they are there for.
FOLDER = str(Path(__file__).parent / "search-path")


def enable(force: bool = False) -> None:
    """Make `import bitsandbytes` import bnb_core under that name, in this process and in those that it starts.

    Call it before anything imports bitsandbytes, or looks whether it is installed, as `import transformers` does. Neither it nor
    importing this module imports torch. It changes `sys.path` and the environment variable PYTHONPATH.

    Args:
        force: do so even where the real bitsandbytes is installed, which then cannot be imported.

    Raises:
        InstalledBitsandbytesError: the real bitsandbytes is installed, and `force` is False; or it is imported already.
    """
    spec = importlib.util.find_spec("bitsandbytes")
    real = None if spec is None or _is_alias(spec.origin) else os.path.dirname(str(spec.origin))
    if real is not None and "bitsandbytes" in sys.modules:
        raise InstalledBitsandbytesError(
            f"the real bitsandbytes is imported already, from {real}; enable the alias before anything imports bitsandbytes"
        )
    if real is not None and not force:
        raise InstalledBitsandbytesError(
            f"the real bitsandbytes is installed in {real}; uninstall it, or hide it by enable(force=True) or `bnb run --force`"
        )
    sys.path[:] = [FOLDER, *(entry for entry in sys.path if entry != FOLDER)]
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", FOLDER)]
    os.environ["PYTHONPATH"] = os.pathsep.join([FOLDER, *inherited])
    importlib.invalidate_caches()


def _is_alias(origin: object) -> bool:
    return isinstance(origin, str) and os.path.dirname(os.path.dirname(origin)) == FOLDER
