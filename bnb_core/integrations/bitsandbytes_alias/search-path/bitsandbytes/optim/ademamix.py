"""AdEMAMix, with 32-bit and 8-bit states."""

import math
from typing import Any, Callable, Optional, Tuple

import torch

from bitsandbytes.optim._classes import subclasses

AdEMAMix, AdEMAMix8bit, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix32bit = subclasses(
    __name__, "AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit"
)

__all__ = ["AdEMAMix", "AdEMAMix8bit", "AdEMAMix32bit", "PagedAdEMAMix", "PagedAdEMAMix8bit", "PagedAdEMAMix32bit"]


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix in plain PyTorch operations, which tests for bitsandbytes compare with. The arguments are those of `AdEMAMix`."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: Optional[int] = None,
        t_alpha: Optional[int] = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "t_beta3": t_beta3, "t_alpha": t_alpha})

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Update the parameters that have a gradient, and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step = group["step"] = group.get("step", 0) + 1
            beta1, beta2, beta3 = group["betas"]
            alpha, slow = group["alpha"], beta3
            if group["t_alpha"] is not None:
                alpha = min(alpha, alpha * step / group["t_alpha"])
            if group["t_beta3"] is not None:
                done = step / group["t_beta3"]
                scale = (1.0 - done) * math.log(beta3) + done * math.log(beta1)
                slow = min(beta3, math.exp(math.log(beta1) * math.log(beta3) / scale))
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["m1_m2"], state["nu"] = param.new_zeros((2, *param.shape)), torch.zeros_like(param)
                (fast, average), square = state["m1_m2"], state["nu"]
                fast.lerp_(param.grad, 1.0 - beta1)
                average.lerp_(param.grad, 1.0 - slow)
                square.mul_(beta2).addcmul_(param.grad, param.grad, value=1.0 - beta2)
                numerator = fast / (1.0 - beta1**step) + alpha * average
                direction = numerator / (square.sqrt() / math.sqrt(1.0 - beta2**step) + group["eps"])
                param.sub_(group["lr"] * (direction + group["weight_decay"] * param))
        return loss
