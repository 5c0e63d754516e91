"""Optimizer kernels: pieces of memory, options that only the op has, scalars on a device, and how much memory a step takes."""

import math
import os
import subprocess
import sys

import bnb_reference
import pytest
import torch

from bnb_core.backends import ANY_DEVICE
from bnb_core.ops import Hyperparameters, optimizer_step_8bit_blockwise_, optimizer_step_32bit_
from bnb_core.ops.optimizer import required_states
from bnb_core.ops.plain import REGISTERED
from bnb_core.ops.spec import ALGORITHMS, OPS

N = 700
COMMON = {"eps": 1e-8, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
RULES = {
    "adam": Hyperparameters(**COMMON, decoupled_weight_decay=True, amsgrad=True, max_unorm=0.1),
    "ademamix": Hyperparameters(**COMMON, beta3=0.999, alpha=5.0, t_alpha=10, t_beta3=10, decoupled_weight_decay=True),
    "lion": Hyperparameters(**COMMON, decoupled_weight_decay=True),
    "sgd": Hyperparameters(**COMMON, momentum=0.9, dampening=0.1, nesterov=True, max_unorm=0.02),
    "rmsprop": Hyperparameters(**COMMON, momentum=0.9, centered=True),
    "adagrad": Hyperparameters(**COMMON, lr_decay=0.1),
}
rules = pytest.mark.parametrize("algorithm", ALGORITHMS)


class Problem:
    """One parameter with its states, which can be stepped."""

    def __init__(self, algorithm, bits, hyperparameters=None, dtype=torch.float32, blocksize=256, n=N, device="cpu", codebook=None):
        self.algorithm, self.bits, self.blocksize = algorithm, bits, blocksize
        self.hyperparameters = hyperparameters or RULES[algorithm]
        generator = torch.Generator().manual_seed(0)
        self.param = torch.randn(n, generator=generator).to(device, dtype)
        self.gradients = torch.Generator().manual_seed(1)
        self.needed = required_states(algorithm, self.hyperparameters)
        of = torch.float32 if bits == 32 else torch.uint8
        self.states = [[torch.zeros(n, dtype=of, device=device)] if need else [] for need in self.needed]
        blocks = -(-n // blocksize)
        self.absmax = [[torch.zeros(blocks, device=device)] if need else [] for need in self.needed]
        self.codebooks = [codebook if need else None for need in self.needed]

    def step(self, t, lr=0.01, grad=None):
        if grad is None:
            grad = torch.randn(self.param.shape, generator=self.gradients).to(self.param.dtype)
        rest = (self.algorithm, self.hyperparameters, t, lr)
        if self.bits == 32:
            optimizer_step_32bit_([self.param], [grad], *self.states, *rest)
        else:
            tensors = (*self.states, *self.absmax, *self.codebooks)
            optimizer_step_8bit_blockwise_([self.param], [grad], *tensors, *rest, self.blocksize)

    def tensors(self):
        lists = [*self.states, *self.absmax] if self.bits == 8 else self.states
        return [self.param, *(tensor for tensors in lists for tensor in tensors)]


def assert_equal(a, b):
    for one, other in zip(a.tensors(), b.tensors()):
        assert torch.equal(one, other)


@pytest.fixture
def many_pieces(monkeypatch):
    """Cut into pieces of 64 elements, or of a block, from here on."""
    from bnb_reference import devices, optimizer

    return lambda: monkeypatch.setattr(devices, "CPU_PIECE", 64 * optimizer._TENSORS_AT_ONCE)


@rules
@pytest.mark.parametrize(("bits", "blocksize"), [(32, 256), (8, 256), (8, 16), (8, 100)])
def test_pieces_change_nothing(algorithm, bits, blocksize, dtype, dynamic, many_pieces):
    # Norms are summed in another order: a power of two keeps their ratio from mattering.
    hyperparameters = RULES[algorithm]._replace(max_unorm=0.0)
    problems = [Problem(algorithm, bits, hyperparameters, dtype, blocksize, codebook=dynamic) for _ in range(2)]
    for t in (1, 2, 3):
        problems[0].step(t)
    many_pieces()
    for t in (1, 2, 3):
        problems[1].step(t)
    assert_equal(*problems)


@rules
@pytest.mark.parametrize("bits", [32, 8])
def test_norms_are_those_of_the_whole_tensor(algorithm, bits, dynamic, many_pieces):
    hyperparameters = RULES[algorithm]._replace(max_unorm=0.01, weight_decay=0.0)
    many_pieces()
    limited = Problem(algorithm, bits, hyperparameters, codebook=dynamic)
    free = Problem(algorithm, bits, hyperparameters._replace(max_unorm=0.0), codebook=dynamic)
    start = limited.param.clone()
    limited.step(1, lr=1.0)
    free.step(1, lr=1.0)
    steps = [problem.param.double() - start.double() for problem in (limited, free)]
    torch.testing.assert_close(steps[0].norm(), 0.01 * start.double().norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(steps[0] / steps[0].norm(), steps[1] / steps[1].norm(), rtol=0, atol=1e-5)


@rules
@pytest.mark.parametrize("bits", [32, 8])
def test_short_updates_are_not_stretched(algorithm, bits, dynamic):
    hyperparameters = RULES[algorithm]._replace(max_unorm=1e6)
    problems = [Problem(algorithm, bits, h, codebook=dynamic) for h in (hyperparameters, hyperparameters._replace(max_unorm=0.0))]
    for problem in problems:
        problem.step(1)
        problem.step(2)
    assert_equal(*problems)


@rules
@pytest.mark.parametrize("bits", [32, 8])
def test_a_parameter_of_zeros_has_no_limit(algorithm, bits, dynamic):
    problem = Problem(algorithm, bits, codebook=dynamic)
    problem.param.zero_()
    problem.step(1)
    assert problem.param.abs().min() > 0


@rules
@pytest.mark.parametrize("bits", [32, 8])
def test_zeros_are_skipped_if_asked(algorithm, bits, dynamic):
    problem = Problem(algorithm, bits, RULES[algorithm]._replace(skip_zeros=True), codebook=dynamic)
    problem.step(1)
    before = problem.param.clone(), [tensors[0].clone() for tensors in problem.states if tensors]
    grad = torch.randn(N)
    grad[::3] = 0.0
    problem.step(2, grad=grad)
    assert torch.equal(problem.param[::3], before[0][::3])
    assert not torch.eq(problem.param[1::3], before[0][1::3]).any()
    if bits == 32:
        assert all(torch.equal(t[0][::3], b[::3]) for t, b in zip([t for t in problem.states if t], before[1]))


@rules
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_elements_without_a_finite_gradient_are_left_alone(algorithm, bits, value, dtype, dynamic):
    # Their neighbours move as they do beside a gradient of zero, which moves no norm either.
    hyperparameters = RULES[algorithm]._replace(weight_decay=0.0, max_unorm=0.0)
    problem = Problem(algorithm, bits, hyperparameters, dtype, codebook=dynamic)
    problem.step(1)
    before = problem.param.clone()
    grad = torch.randn(N).to(dtype)
    grad[5::7] = value
    problem.step(2, grad=grad)
    assert torch.equal(problem.param[5::7], before[5::7])
    assert all(torch.isfinite(tensor.float()).all() for tensor in problem.tensors())


@rules
@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_are_scaled(algorithm, bits, dynamic):
    problems = [Problem(algorithm, bits, RULES[algorithm]._replace(gnorm_scale=s), codebook=dynamic) for s in (0.25, 1.0)]
    for t in (1, 2):
        grad = torch.randn(N)
        problems[0].step(t, grad=grad)
        problems[1].step(t, grad=0.25 * grad)
    assert_equal(*problems)


@rules
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("forbidden", [False, True])
def test_scalars_in_tensors_do_the_same_and_need_not_be_read(algorithm, bits, dynamic, forbidden, request):
    if forbidden:
        request.getfixturevalue("host_reads_forbidden")
    numbers, tensors = (Problem(algorithm, bits, codebook=dynamic) for _ in range(2))
    for t in (1, 2, 3):
        lr = float(torch.tensor(0.01 / t))
        numbers.step(t, lr)
        tensors.step(torch.tensor(float(t)), torch.tensor(lr))
    assert_equal(numbers, tensors)


@rules
@pytest.mark.skipif(not REGISTERED, reason="this torch has no complete meta device")
def test_kernels_read_nothing_off_another_device(algorithm, dtype):
    for bits, op in ((32, "optimizer_step_32bit_"), (8, "optimizer_step_8bit_blockwise_")):
        codebook = torch.zeros(256, device="meta")
        p = Problem(algorithm, bits, dtype=dtype, device="meta", codebook=codebook)
        states = p.states if bits == 32 else (*p.states, *p.absmax, *p.codebooks)
        number = torch.zeros((), device="meta")
        rest = (algorithm, p.hyperparameters, number, number, *(() if bits == 32 else (256,)))
        bnb_reference.backend.kernels[op].function([p.param], [torch.zeros_like(p.param)], *states, *rest)


@pytest.mark.parametrize("op", ["optimizer_step_32bit_", "optimizer_step_8bit_blockwise_"])
def test_has_a_kernel_for_every_device_and_dtype(op):
    kernel = bnb_reference.backend.kernels[op]
    assert kernel.devices == {ANY_DEVICE}
    assert kernel.dtypes == set(OPS[op].dtypes)
    assert kernel.when is None


MEASURE = """
import resource, sys, torch
import bnb_core.backends as backends, bnb_core.ops as ops, bnb_reference
backends.register(bnb_reference.backend)
torch.set_num_threads(1)

def run(n):
    param, grad, codebook = torch.ones(n), torch.ones(n), torch.linspace(-1, 1, 256)
    h = ops.Hyperparameters(beta1=0.9, beta2=0.99, eps=1e-8, max_unorm=1.0)
    if sys.argv[1] == "8":
        states = [torch.ones(n, dtype=torch.uint8) for _ in range(2)]
        absmax = [torch.ones(-(-n // 256)) for _ in range(2)]
        args = ([states[0]], [states[1]], [], [absmax[0]], [absmax[1]], [], codebook, codebook, None)
        work = lambda: ops.optimizer_step_8bit_blockwise_([param], [grad], *args, "adam", h, 1, 0.1, 256)
    else:
        args = ([torch.ones(n)], [torch.ones(n)], [])
        work = lambda: ops.optimizer_step_32bit_([param], [grad], *args, "adam", h, 1, 0.1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

run(1 << 18)
print(run(1 << 23))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("bits", ["32", "8"])
def test_a_step_needs_little_memory_however_large_the_parameter(bits):
    # The parameter has 32 MB; a step that worked on all of it at once would need several times as much. glibc is told to give
    # memory back at once, so that what is counted is what is in use.
    command = [sys.executable, "-c", MEASURE, bits]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert 0 <= int(result.stdout) < 16e6
