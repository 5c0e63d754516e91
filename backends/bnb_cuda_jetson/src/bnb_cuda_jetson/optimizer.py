"""Kernels of optimizer steps."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch

from bnb_core.backends import Call
from bnb_core.ops.spec import Hyperparameters
from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import DTYPES, address, current_stream, kernel

Tensors = Sequence[torch.Tensor]
Number = Union[float, torch.Tensor]

#: Whether the native code takes tensors themselves, which costs a fraction of asking each for its address.
_EXCHANGED = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and _native.use_exchange(torch.Tensor.__dlpack_c_exchange_api__)

#: Elements of a unit of work where states have no blocks; the same as in native/host/optimizer.cpp.
_PIECE = 256


def _scratch(call: Call, blocksize: int) -> int:
    hyperparameters = call.hyperparameters
    limited = hyperparameters.max_unorm > 0.0
    if limited or isinstance(call.step, torch.Tensor) or isinstance(call.lr, torch.Tensor):
        return _native.optimizer_scratch_bytes([param.numel() for param in call.params], blocksize, limited)
    return 0


@kernel("optimizer_step_32bit_", scratch=lambda call: _scratch(call, _PIECE))
def optimizer_step_32bit_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
    *,
    scratch: torch.Tensor,
) -> None:
    """Update each parameter and its float32 states."""
    device = params[0].get_device()
    _native.optimizer_step_32bit(
        device,
        current_stream(device),
        DTYPES[params[0].dtype],
        _listed(params),
        _listed(grads),
        _listed(state1),
        _listed(state2),
        _listed(state3),
        [] if _EXCHANGED else list(map(torch.Tensor.numel, params)),
        *_rule(algorithm, hyperparameters, step, lr),
        scratch.data_ptr(),
    )


@kernel("optimizer_step_8bit_blockwise_", scratch=lambda call: _scratch(call, call.blocksize))
def optimizer_step_8bit_blockwise_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    absmax3: Tensors,
    codebook1: Optional[torch.Tensor],
    codebook2: Optional[torch.Tensor],
    codebook3: Optional[torch.Tensor],
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
    blocksize: int,
    *,
    scratch: torch.Tensor,
) -> None:
    """Update each parameter and its states, which are dequantized and quantized again in registers."""
    device = params[0].get_device()
    _native.optimizer_step_8bit(
        device,
        current_stream(device),
        DTYPES[params[0].dtype],
        _listed(params),
        _listed(grads),
        _listed(state1),
        _listed(state2),
        _listed(state3),
        _listed(absmax1),
        _listed(absmax2),
        _listed(absmax3),
        [] if _EXCHANGED else list(map(torch.Tensor.numel, params)),
        address(codebook1) if state1 else 0,
        address(codebook2) if state2 else 0,
        address(codebook3) if state3 else 0,
        blocksize,
        *_rule(algorithm, hyperparameters, step, lr),
        scratch.data_ptr(),
    )


def _listed(tensors: Tensors) -> List[Any]:
    return list(tensors) if _EXCHANGED else list(map(torch.Tensor.data_ptr, tensors))


def _rule(algorithm: str, hyperparameters: Hyperparameters, step: Number, lr: Number) -> Tuple[str, List[float], int, int]:
    """Return the kernels' algorithm, its numbers in the native code's order, and the addresses of step and lr on the device."""
    h = hyperparameters
    step_on_device, lr_on_device = isinstance(step, torch.Tensor), isinstance(lr, torch.Tensor)
    numbers = [
        1.0 if step_on_device else step,
        0.0 if lr_on_device else lr,
        h.beta1,
        h.beta2,
        h.beta3,
        h.alpha,
        h.t_alpha,
        h.t_beta3,
        h.eps,
        h.momentum,
        h.dampening,
        h.lr_decay,
        h.weight_decay,
        h.gnorm_scale,
        h.max_unorm,
        h.decoupled_weight_decay,
        h.skip_zeros,
        h.nesterov,
        h.bias_correction,
    ]
    if algorithm in ("adagrad", "rmsprop"):
        numbers[-1] = False  # which belongs to betas that these do not have in that sense
    name = "amsgrad" if algorithm == "adam" and h.amsgrad else algorithm
    return name, numbers, address(step) if step_on_device else 0, address(lr) if lr_on_device else 0
