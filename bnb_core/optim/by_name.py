"""Optimizers whose algorithm is told by bitsandbytes' name for it, to derive from: `Optimizer1State`, `Optimizer2State`."""

from __future__ import annotations

import inspect
from types import MappingProxyType
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Type

from bnb_core.errors import InvalidArgumentError
from bnb_core.optim.algorithms import LAMB, LARS, SGD, Adagrad, Adam, AdEMAMix, Lion, RMSprop, check_nesterov
from bnb_core.optim.checkpoint import spread_betas
from bnb_core.optim.optimizer import Optimizer

#: bitsandbytes' names of algorithms, by the number of states that it counts.
ONE_STATE: Mapping[str, Type[Optimizer]] = MappingProxyType(
    {"momentum": SGD, "lars": LARS, "rmsprop": RMSprop, "adagrad": Adagrad, "lion": Lion}
)
TWO_STATES: Mapping[str, Type[Optimizer]] = MappingProxyType({"adam": Adam, "lamb": LAMB, "ademamix": AdEMAMix})


def algorithm_named(who: str, name: str, among: Mapping[str, Type[Optimizer]]) -> Type[Optimizer]:
    """Return the class of an algorithm.

    Args:
        who: what is called, for messages.
        name: bitsandbytes' name.
        among: the classes by name.

    Raises:
        InvalidArgumentError: there is none of this name.
    """
    if name not in among:
        raise InvalidArgumentError(f"{who}: optimizer_name is {name!r}; it must be one of {', '.join(among)}")
    return among[name]


def options_for(
    who: str, cls: Type[Optimizer], given: Mapping[str, Any], no_effect: Mapping[str, Sequence[Any]] = MappingProxyType({})
) -> Dict[str, Any]:
    """Return all options of an algorithm from those that any of them may have.

    Args:
        who: what is called, for messages.
        cls: the class of the algorithm. Options that are not given have its defaults.
        given: options by bitsandbytes' names.
        no_effect: values besides 0 and None that an option may have which the algorithm has not.

    Raises:
        InvalidArgumentError: an option that the algorithm has not, with any other value.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    own = {name: value for name, value in spread_betas(given, defaults, cls.in_betas).items() if name in defaults}
    spread = ("betas",) if cls.in_betas and not any(given["betas"][len(cls.in_betas) :]) else ()
    for name, value in given.items():
        if name in own or name in spread or value in (0, None, *no_effect.get(name, ())):
            continue
        if name != "betas" or any(value):
            raise InvalidArgumentError(f"{who}: {name} is {value!r}, but {cls.__name__} has no {name}; pass 0, or leave it out")
    return {**{name: defaults[name] for name in _algorithm_options(cls)}, **own}


def _algorithm_options(cls: Type[Optimizer]) -> Sequence[str]:
    """Name the options that belong to the algorithm, and have a default."""
    general = inspect.signature(Optimizer).parameters
    parameters = inspect.signature(cls).parameters.items()
    return [name for name, parameter in parameters if name not in general and parameter.default is not parameter.empty]


class _ByName(Optimizer):
    """What both have in common: the class of the algorithm, whose options and states are theirs."""

    def __init__(self, optimizer_name: str, cls: Type[Optimizer], params: Any, options: Dict[str, Any], **general: Any) -> None:
        self.optimizer_name = optimizer_name
        self._rules = cls
        super().__init__(params, options, **general)

    @property
    def rules(self) -> Type[Optimizer]:
        """The class that says what the algorithm's options are to the op, and where its states are kept."""
        return self._rules

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that have no meaning."""
        super().check(options)
        if "nesterov" in options:
            check_nesterov(type(self).__name__, options)

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), "optimizer_name": self.optimizer_name, "_rules": self._rules}


class Optimizer2State(_ByName):
    """An optimizer with two states, by the name of its algorithm.

    Args:
        optimizer_name: "adam", "lamb" or "ademamix".
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0.
        betas: decay rates, as the class of the algorithm takes them: two, or three for "ademamix".
        eps: added to the denominator, at least 0.
        weight_decay: part of a parameter, times lr, that is taken off before each update; at least 0.
        optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged, capturable: see `Optimizer`.
        alpha, t_alpha, t_beta3: see `AdEMAMix`; for the others 0 and None.

    Raises:
        InvalidArgumentError: no such algorithm, or an option that has a value which is not accepted.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: Optional[int] = None,
        t_beta3: Optional[int] = None,
        *,
        capturable: bool = False,
    ) -> None:
        who = type(self).__name__
        cls = algorithm_named(who, optimizer_name, TWO_STATES)
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        given.update(alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3)
        super().__init__(
            optimizer_name,
            cls,
            params,
            options_for(who, cls, given),
            optim_bits=optim_bits,
            is_paged=is_paged,
            args=args,
            min_8bit_size=min_8bit_size,
            max_unorm=max_unorm,
            skip_zeros=skip_zeros,
            capturable=capturable,
        )


class Optimizer1State(_ByName):
    """An optimizer with one state, by the name of its algorithm.

    Args:
        optimizer_name: "momentum", which is SGD, "lars", "rmsprop", "adagrad" or "lion".
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0.
        betas: momentum and dampening of "momentum" and "lars"; decay rate and momentum of "rmsprop"; the two of "lion". Those of
            "adagrad" are 0, or left out.
        eps: added to the denominator, at least 0. Where there is none, as in "momentum", "lars" and "lion", it is 0, or left out.
        weight_decay: at least 0; see the class of the algorithm.
        optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged, capturable: see `Optimizer`.

    Raises:
        InvalidArgumentError: no such algorithm, or an option that has a value which is not accepted.
    """

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        who = type(self).__name__
        cls = algorithm_named(who, optimizer_name, ONE_STATE)
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            optimizer_name,
            cls,
            params,
            options_for(who, cls, given, {"betas": [(0.9, 0.0)], "eps": [1e-8]}),
            optim_bits=optim_bits,
            is_paged=is_paged,
            args=args,
            min_8bit_size=min_8bit_size,
            max_unorm=max_unorm,
            skip_zeros=skip_zeros,
            capturable=capturable,
        )
