"""Helpers."""

from bitsandbytes.cextension import not_provided
from bnb_core import utils
from bnb_core.utils import *  # noqa: F403

execute_and_return = not_provided("utils.execute_and_return", "use subprocess.run")

__all__ = [*utils.__all__, "execute_and_return"]
