"""The environment variables of bnb_core: what each means, read strictly."""

from __future__ import annotations

import difflib
import os
from typing import Iterable, List, Mapping, Tuple

from bnb_core.errors import ConfigurationError

#: Every variable that bnb_core reads. Those of a backend start with `BNB_<NAME>_` and are documented by its package.
VARIABLES: Mapping[str, str] = {
    "BNB_BACKEND": "names of the backends to use, in order, separated by commas",
    "BNB_FALLBACK": "what happens where the preferred backend cannot run an op: warn (default), allow or never",
    "BNB_DISABLED_BACKENDS": "names of installed backends that must not be loaded, separated by commas",
    "BNB_TUNE_CACHE": "folder of the tables that `bnb tune` writes; by default one in the user's folder for caches",
}

FALLBACK_POLICIES = ("warn", "allow", "never")


def names(variable: str) -> Tuple[str, ...]:
    """Read names separated by commas."""
    return tuple(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())


def fallback_policy() -> str:
    """Read `BNB_FALLBACK`.

    Raises:
        ConfigurationError: it is set to something else than warn, allow or never.
    """
    policy = os.environ.get("BNB_FALLBACK") or FALLBACK_POLICIES[0]
    if policy not in FALLBACK_POLICIES:
        accepted = ", ".join(FALLBACK_POLICIES)
        raise ConfigurationError(f"BNB_FALLBACK={policy!r} is not one of {accepted}; set one of these or unset it")
    return policy


def unknown_variables(backends: Iterable[str]) -> List[str]:
    """Describe each `BNB_*` variable that neither bnb_core nor one of these backends reads, with the name that may be meant."""
    prefixes = tuple(f"BNB_{name.upper()}_" for name in backends)
    messages = []
    for variable in sorted(os.environ):
        if variable.startswith("BNB_") and variable not in VARIABLES and not variable.startswith(prefixes):
            close = difflib.get_close_matches(variable, VARIABLES, n=1)
            hint = f"did you mean {close[0]}?" if close else "nothing here reads it"
            messages.append(f"{variable} is set but unknown; {hint}")
    return messages
