"""The algorithms: for each its options, what they are to the op, and where its states are kept.

Options have torch.optim's names where it has the algorithm, so that schedulers find them. Signatures are bitsandbytes'.
"""

from __future__ import annotations

from typing import Any, Mapping, Optional, Tuple

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops.spec import Hyperparameters
from bnb_core.optim.optimizer import Optimizer
from bnb_core.optim.state_formats import Slot

Options = Mapping[str, Any]


class Adam(Optimizer):
    """Adam (arXiv 1412.6980). Weight decay is decoupled, as in bitsandbytes: with it, this is AdamW.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0; a number, or a float32 tensor without dimensions.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: part of a parameter, times lr, that is taken off before each update; at least 0.
        amsgrad: divide by the largest average that there was (openreview ryQu7f-RZ), which takes a third state.
        optim_bits, args, min_8bit_size, is_paged, capturable: see `Optimizer`.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "adam"
    slots = (Slot(1), Slot(2, signed=False), Slot(3, signed=False))
    decoupled_weight_decay = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad},
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            capturable=capturable,
        )


class AdamW(Adam):
    """AdamW (arXiv 1711.05101): Adam with decoupled weight decay, 0.01 unless set otherwise. The arguments are those of `Adam`."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, capturable=capturable
        )


class LAMB(Optimizer):
    """LAMB (arXiv 1904.00962): Adam whose update is no longer than its parameter.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0; a number, or a float32 tensor without dimensions.
        bias_correction: correct the averages for their start at zero.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0; see `adam_w_mode`.
        amsgrad: divide by the largest average that there was, which takes a third state.
        adam_w_mode: take weight_decay times lr of a parameter off before each update; otherwise add weight_decay times the
            parameter to its gradient.
        max_unorm: the update's L2 norm is at most this many times the parameter's; 0 for no limit.
        optim_bits, args, min_8bit_size, capturable: see `Optimizer`. `args` replaces `max_unorm` too.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "adam"
    slots = Adam.slots
    decoupled_weight_decay = True  # unless adam_w_mode is False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "adam_w_mode": adam_w_mode,
            },
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            max_unorm=max_unorm,
            capturable=capturable,
        )

    @classmethod
    def hyperparameters(cls, options: Options) -> Hyperparameters:
        """Translate options to what the op takes."""
        return super().hyperparameters(options)._replace(decoupled_weight_decay=options["adam_w_mode"])


class AdEMAMix(Optimizer):
    """AdEMAMix (arXiv 2409.03137): AdamW with a second, slow average of the gradient.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0; a number, or a float32 tensor without dimensions.
        betas: decay rates of the average of the gradient, of that of its square, and of the slow one, each in [0, 1).
        alpha: weight of the slow average, at least 0.
        t_alpha: steps over which alpha grows from 0; None for no growth.
        t_beta3: steps over which the slow decay rate grows from the first; None for no growth.
        eps: added to the denominator, at least 0.
        weight_decay: part of a parameter, times lr, that is taken off before each update; at least 0.
        optim_bits, min_8bit_size, is_paged, capturable: see `Optimizer`.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "ademamix"
    slots = (Slot(1, half=0), Slot(2, signed=False), Slot(1, half=1))
    decoupled_weight_decay = True
    number_of_betas = 3

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: Optional[int] = None,
        t_beta3: Optional[int] = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "alpha": alpha,
                "t_alpha": t_alpha,
                "t_beta3": t_beta3,
                "eps": eps,
                "weight_decay": weight_decay,
            },
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            capturable=capturable,
        )


class Lion(Optimizer):
    """Lion (arXiv 2302.06675): the sign of an average of the gradient.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0; a number, or a float32 tensor without dimensions.
        betas: decay rates of the average in the update and of the one that is kept, each in [0, 1).
        weight_decay: part of a parameter, times lr, that is taken off before each update; at least 0.
        optim_bits, args, min_8bit_size, is_paged, capturable: see `Optimizer`.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "lion"
    slots = (Slot(1), None, None)
    decoupled_weight_decay = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            is_paged=is_paged,
            capturable=capturable,
        )


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum as in torch.optim.SGD.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0; a number, or a float32 tensor without dimensions.
        momentum: decay rate of the sum of gradients, at least 0; without momentum there is no state.
        dampening: part of each gradient but the first that is left out of the sum.
        weight_decay: times the parameter, is added to its gradient; at least 0.
        nesterov: look ahead along the sum; needs momentum, and no dampening.
        optim_bits, args, min_8bit_size, capturable: see `Optimizer`.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "sgd"
    slots = (Slot(1), None, None)
    decoupled_weight_decay = False
    in_betas = ("momentum", "dampening")

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov},
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            capturable=capturable,
        )

    def check(self, options: Options) -> None:
        """Refuse options that have no meaning."""
        super().check(options)
        check_nesterov(type(self).__name__, options)


class LARS(Optimizer):
    """LARS (arXiv 1708.03888): SGD whose update is no longer than a part of its parameter.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as in `SGD`.
        max_unorm: the update's L2 norm is at most this many times the parameter's; 0 for no limit.
        optim_bits, args, min_8bit_size, capturable: see `Optimizer`. `args` replaces `max_unorm` too.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "sgd"
    slots = SGD.slots
    decoupled_weight_decay = False
    in_betas = SGD.in_betas

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov},
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            max_unorm=max_unorm,
            capturable=capturable,
        )

    def check(self, options: Options) -> None:
        """Refuse options that have no meaning."""
        super().check(options)
        check_nesterov(type(self).__name__, options)


class RMSprop(Optimizer):
    """RMSprop (G. Hinton, lecture 6e of "Neural Networks for Machine Learning"), as in torch.optim.RMSprop.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0; a number, or a float32 tensor without dimensions.
        alpha: decay rate of the average of the squared gradient, at least 0.
        eps: added to the denominator, at least 0.
        weight_decay: times the parameter, is added to its gradient; at least 0.
        momentum: decay rate of a sum of updates, at least 0.
        centered: divide by the gradient's variance (arXiv 1308.0850), which takes another state.
        optim_bits, args, min_8bit_size, capturable: see `Optimizer`.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "rmsprop"
    slots = (Slot(1), Slot(2), Slot(3))  # the squares too have signed codes, as in bitsandbytes
    decoupled_weight_decay = False
    in_betas = ("alpha", "momentum")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum, "centered": centered},
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            capturable=capturable,
        )

    @classmethod
    def hyperparameters(cls, options: Options) -> Hyperparameters:
        """Translate options to what the op takes."""
        return super().hyperparameters(options)._replace(beta2=options["alpha"], alpha=0.0)


class Adagrad(Optimizer):
    """Adagrad (jmlr.org/papers/v12/duchi11a.html), as in torch.optim.Adagrad.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0; a number, or a float32 tensor without dimensions.
        lr_decay: lr is divided by 1 + lr_decay times the steps before this one; at least 0.
        weight_decay: times the parameter, is added to its gradient; at least 0.
        initial_accumulator_value: what the sum of squared gradients starts with, at least 0.
        eps: added to the denominator, at least 0.
        optim_bits, args, min_8bit_size, capturable: see `Optimizer`.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    algorithm = "adagrad"
    slots = (Slot(1), None, None)  # signed codes, as in bitsandbytes, though a sum of squares has no sign
    decoupled_weight_decay = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
            },
            optim_bits=optim_bits,
            args=args,
            min_8bit_size=min_8bit_size,
            capturable=capturable,
        )

    @classmethod
    def initial_value(cls, options: Options) -> float:
        """Return what the elements of a new state are."""
        return float(options["initial_accumulator_value"])


def check_nesterov(who: str, options: Options) -> None:
    """Refuse Nesterov momentum where it is not defined.

    Raises:
        InvalidArgumentError: `nesterov` without momentum, or with dampening.
    """
    if options["nesterov"] and (not options["momentum"] or options["dampening"]):
        raise InvalidArgumentError(
            f"{who}: nesterov with momentum {options['momentum']} and dampening {options['dampening']}; "
            "it needs momentum above 0 and no dampening"
        )
