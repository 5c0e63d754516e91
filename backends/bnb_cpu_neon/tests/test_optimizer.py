"""The optimizer steps: the same bytes as the reference for exact states, and constants that come from float64."""

from __future__ import annotations

import math

import pytest
import torch
from bnb_cpu_neon.optimizer import ALGORITHM_NUMBERS

from bnb_core import ops
from bnb_core.backends import use_backend
from bnb_core.ops.spec import ALGORITHMS, Hyperparameters
from bnb_core.quantization.codebooks import create_dynamic_map


def test_every_algorithm_has_a_number():
    assert list(ALGORITHM_NUMBERS) == list(ALGORITHMS)


@pytest.mark.parametrize("n", [1, 17, 256, 300, 4096])
@pytest.mark.parametrize("gradient_scale", [1.0, 1e-30, 1e30])
def test_stored_codes_are_those_that_quantize_blockwise_gives(n, gradient_scale):
    """At the first step of SGD with momentum, the new state is the gradient: there is nothing to round before it is quantized."""
    torch.manual_seed(n)
    codebook = create_dynamic_map()
    grad = torch.randn(n) * gradient_scale
    codes, absmax = torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // 256))
    hyperparameters = Hyperparameters(momentum=0.9)
    with use_backend("neon"):
        ops.optimizer_step_8bit_blockwise_(
            [torch.zeros(n)], [grad], [codes], [], [], [absmax], [], [], codebook, None, None, "sgd", hyperparameters, 1, 1.0
        )
    with use_backend("reference"):
        expected_codes, expected_absmax = ops.quantize_blockwise(grad, codebook, 256)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_constants_are_worked_out_in_float64(as_tensor):
    """1 - beta2 would lose half its digits in float32."""
    beta2, step, lr = 0.9999999, 3, 0.5
    param, grad = torch.zeros(16), torch.ones(16)
    m, v = torch.zeros(16), torch.zeros(16)
    number = (lambda value: torch.tensor(float(value))) if as_tensor else (lambda value: value)
    with use_backend("neon"):
        ops.optimizer_step_32bit_(
            [param], [grad], [m], [v], [], "adam", Hyperparameters(beta1=0.9, beta2=beta2), number(step), number(lr)
        )
    second = (1 - beta2) / (1 - beta2**step)
    expected = -lr * (1 - 0.9) / (1 - 0.9**step) / math.sqrt(second)
    assert v[0].item() == pytest.approx(1 - beta2, rel=1e-6)
    assert param[0].item() == pytest.approx(expected, rel=1e-6)


def test_codebooks_are_told_apart_by_their_contents():
    """Another codebook in the same memory is another codebook."""
    codebook = torch.linspace(-1, 1, 256)
    grad = torch.linspace(-1, 1, 256)
    hyperparameters = Hyperparameters(momentum=0.9)
    results = []
    for _ in range(2):
        codes = torch.zeros(256, dtype=torch.uint8)
        with use_backend("neon"):
            ops.optimizer_step_8bit_blockwise_(
                [torch.zeros(256)], [grad], [codes], [], [], [torch.zeros(1)], [], [], codebook, None, None, "sgd",
                hyperparameters, 1, 1.0,
            )  # fmt: skip
        results.append(codes)
        codebook.copy_(codebook.flip(0).clone())
    assert torch.equal(results[0].int() + results[1].int(), torch.full((256,), 255, dtype=torch.int32))
