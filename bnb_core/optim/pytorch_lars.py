"""LARS in plain PyTorch operations, which `LARS` can be compared with."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.optim.algorithms import check_nesterov


class PytorchLARS(torch.optim.Optimizer):
    """LARS (arXiv 1708.03888) without kernels: states in the dtype of the parameters, one parameter after another.

    Args:
        params: parameters, or dictionaries that set options for some of them.
        lr: learning rate, at least 0.
        momentum: decay rate of the sum of gradients, at least 0.
        dampening: part of each gradient but the first that is left out of the sum.
        weight_decay: times the parameter, is added to its gradient; at least 0.
        nesterov: look ahead along the sum; needs momentum, and no dampening.
        max_unorm: the update's L2 norm is at most this many times the parameter's; 0 for no limit.

    Raises:
        InvalidArgumentError: an option has a value that is not accepted.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("max_unorm", max_unorm)):
            if value < 0.0:
                raise InvalidArgumentError(f"PytorchLARS: {name} is {value}; it must be at least 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_unorm": max_unorm,
        }
        check_nesterov("PytorchLARS", defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: computes the loss anew, with gradients, and returns it.

        Returns:
            What `closure` returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    direction = self._direction(group, param, param.grad)
                    limit, length = group["max_unorm"] * param.norm(), direction.norm()
                    scale = torch.where((limit > 0.0) & (length > limit), limit / length, torch.ones_like(limit))
                    param.sub_(direction * scale * group["lr"])
        return loss

    def _direction(self, group: Any, param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.add(param, alpha=group["weight_decay"])
        if not group["momentum"]:
            return grad
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = grad.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(grad, alpha=1.0 - group["dampening"])
        buffer: torch.Tensor = state["momentum_buffer"]
        return grad.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
