"""The named classes of bitsandbytes that fix the format of states, or where they are kept, of an algorithm."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Mapping, Type, TypeVar

from bnb_core.errors import InvalidArgumentError
from bnb_core.optim.algorithms import LAMB, LARS, SGD, Adagrad, Adam, AdamW, AdEMAMix, Lion, RMSprop
from bnb_core.optim.optimizer import Optimizer

_Class = TypeVar("_Class", bound=Type[Optimizer])


def _variant(*, shows: Mapping[str, Any] = {}, **fixed: Any) -> Callable[[_Class], _Class]:
    """Fix arguments of the decorated class's constructor, which it inherits, and take them out of its signature.

    Args:
        shows: fixed arguments that stay in the signature because bitsandbytes has them there, with the default that it gives them.
            They take this default and the fixed value, which mean the same, and nothing else.
        fixed: the arguments.
    """

    def fix(cls: _Class) -> _Class:
        inherited: Callable[..., None] = cls.__init__
        full = inspect.signature(inherited)
        signature = full.replace(
            parameters=[
                parameter.replace(default=shows[name]) if name in shows else parameter
                for name, parameter in full.parameters.items()
                if name not in fixed or name in shows
            ]
        )

        @functools.wraps(inherited)
        def construct(*args: Any, **kwargs: Any) -> None:
            arguments = signature.bind(*args, **kwargs).arguments
            for name, default in shows.items():
                value = arguments.pop(name, default)
                if value not in (default, fixed[name]):
                    raise InvalidArgumentError(
                        f"{cls.__name__}: {name} is {value!r}; this class has {name}={fixed[name]!r}: leave the argument out, "
                        f"or use {cls.__mro__[1].__name__}"
                    )
            inherited(**arguments, **fixed)

        construct.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = construct  # type: ignore[method-assign]
        return cls

    return fix


@_variant(optim_bits=8, shows={"optim_bits": 32})
class Adam8bit(Adam):
    """Adam with 8-bit states."""


@_variant(optim_bits=32, shows={"optim_bits": 32})
class Adam32bit(Adam):
    """Adam with 32-bit states."""


@_variant(is_paged=True, shows={"is_paged": False})
class PagedAdam(Adam):
    """Adam with states in paged memory."""


@_variant(optim_bits=8, is_paged=True, shows={"optim_bits": 32, "is_paged": False})
class PagedAdam8bit(Adam):
    """Adam with 8-bit states in paged memory."""


@_variant(optim_bits=32, is_paged=True, shows={"optim_bits": 32, "is_paged": False})
class PagedAdam32bit(Adam):
    """Adam with 32-bit states in paged memory."""


@_variant(optim_bits=8, shows={"optim_bits": 32})
class AdamW8bit(AdamW):
    """AdamW with 8-bit states."""


@_variant(optim_bits=32, shows={"optim_bits": 32})
class AdamW32bit(AdamW):
    """AdamW with 32-bit states."""


@_variant(is_paged=True)
class PagedAdamW(AdamW):
    """AdamW with states in paged memory."""


@_variant(optim_bits=8, is_paged=True, shows={"optim_bits": 32})
class PagedAdamW8bit(AdamW):
    """AdamW with 8-bit states in paged memory."""


@_variant(optim_bits=32, is_paged=True, shows={"optim_bits": 32})
class PagedAdamW32bit(AdamW):
    """AdamW with 32-bit states in paged memory."""


@_variant(optim_bits=8)
class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states."""


@_variant(optim_bits=32)
class AdEMAMix32bit(AdEMAMix):
    """AdEMAMix with 32-bit states."""


@_variant(is_paged=True)
class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with states in paged memory."""


@_variant(optim_bits=8, is_paged=True)
class PagedAdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states in paged memory."""


@_variant(optim_bits=32, is_paged=True)
class PagedAdEMAMix32bit(AdEMAMix):
    """AdEMAMix with 32-bit states in paged memory."""


@_variant(optim_bits=8)
class Lion8bit(Lion):
    """Lion with 8-bit states."""


@_variant(optim_bits=32)
class Lion32bit(Lion):
    """Lion with 32-bit states."""


@_variant(is_paged=True)
class PagedLion(Lion):
    """Lion with states in paged memory."""


@_variant(optim_bits=8, is_paged=True)
class PagedLion8bit(Lion):
    """Lion with 8-bit states in paged memory."""


@_variant(optim_bits=32, is_paged=True)
class PagedLion32bit(Lion):
    """Lion with 32-bit states in paged memory."""


@_variant(optim_bits=8)
class LAMB8bit(LAMB):
    """LAMB with 8-bit states."""


@_variant(optim_bits=32)
class LAMB32bit(LAMB):
    """LAMB with 32-bit states."""


@_variant(optim_bits=8)
class LARS8bit(LARS):
    """LARS with 8-bit states."""


@_variant(optim_bits=32)
class LARS32bit(LARS):
    """LARS with 32-bit states."""


@_variant(optim_bits=8)
class SGD8bit(SGD):
    """SGD with 8-bit states."""


@_variant(optim_bits=32)
class SGD32bit(SGD):
    """SGD with 32-bit states."""


@_variant(optim_bits=8)
class RMSprop8bit(RMSprop):
    """RMSprop with 8-bit states."""


@_variant(optim_bits=32)
class RMSprop32bit(RMSprop):
    """RMSprop with 32-bit states."""


@_variant(optim_bits=8, shows={"optim_bits": 8})
class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit states."""


@_variant(optim_bits=32, shows={"optim_bits": 32})
class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit states."""
