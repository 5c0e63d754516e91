"""Optimizers under a module of bitsandbytes: clients look for its name in `str(type(optimizer))`."""

from typing import List, Type

from bnb_core import optim


def subclasses(module: str, *names: str) -> List[Type[optim.Optimizer]]:
    """Return a subclass of each of these classes of `bnb_core.optim` that differs in nothing but where it is.

    Args:
        module: name of the module that will hold the classes under the same names.
        names: of the classes.
    """
    bases = [getattr(optim, name) for name in names]
    return [type(base)(base.__name__, (base,), {"__module__": module, "__doc__": base.__doc__}) for base in bases]
