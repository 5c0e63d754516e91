"""Modules with quantized weights, and what clients look for beside them."""

from typing import Union, cast

import torch

from bnb_core import nn
from bnb_core.nn import *  # noqa: F403
from bnb_core.nn.outlier_aware import OutlierTracer
from bnb_core.optim import GlobalOptimManager
from bnb_core.quantization.state import QuantState


def fix_4bit_weight_quant_state_from_module(module: Union[nn.Linear4bit, nn.Embedding4bit]) -> None:
    """Give the weight of a 4-bit module back what its codes stand for, from the copy that the module keeps.

    FSDP replaces parameters by others that know nothing of it.
    """
    if getattr(module.weight, "quant_state", None) is not None:
        return
    if not isinstance(module.weight, nn.Params4bit):
        module.weight = nn.Params4bit(
            module.weight,
            quant_storage=cast(torch.dtype, module.quant_storage),  # for type checkers a module's attribute may be anything
            bnb_quantized=True,
            quant_state=module.quant_state,
        )
    else:
        module.weight.quant_state = module.quant_state


__all__ = [*nn.__all__, "GlobalOptimManager", "OutlierTracer", "QuantState", "fix_4bit_weight_quant_state_from_module"]
