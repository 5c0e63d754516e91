"""Optimizer steps: each hands its tensors to the native kernel of the same name."""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch

from bnb_core.ops.spec import Hyperparameters
from bnb_cpu_neon import engine
from bnb_cpu_neon.engine import DTYPES, kernel

Tensors = Sequence[torch.Tensor]
Number = Union[float, torch.Tensor]

#: What the native module knows each algorithm by; the order is that of `Algorithm` in native/kernels/optimizer.hpp.
ALGORITHM_NUMBERS = {name: number for number, name in enumerate(("adam", "ademamix", "lion", "sgd", "rmsprop", "adagrad"))}


@kernel("optimizer_step_32bit_")
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
) -> None:
    """Update each parameter and its float32 states."""
    engine.native.optimizer_step_32bit(
        DTYPES[params[0].dtype],
        list(params),
        list(grads),
        [list(state1), list(state2), list(state3)],
        ALGORITHM_NUMBERS[algorithm],
        hyperparameters,
        float(step),
        float(lr),
        torch.get_num_threads(),
    )


@kernel("optimizer_step_8bit_blockwise_")
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
) -> None:
    """Update each parameter and its states, which are dequantized and quantized again block by block."""
    engine.native.optimizer_step_8bit_blockwise(
        DTYPES[params[0].dtype],
        list(params),
        list(grads),
        [list(state1), list(state2), list(state3)],
        [list(absmax1), list(absmax2), list(absmax3)],
        [codebook1, codebook2, codebook3],
        ALGORITHM_NUMBERS[algorithm],
        hyperparameters,
        float(step),
        float(lr),
        blocksize,
        torch.get_num_threads(),
    )
