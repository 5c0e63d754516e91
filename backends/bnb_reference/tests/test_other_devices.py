"""The kernels on an accelerator, where there is one: the CPU's results, without synchronization, and captured in a graph."""

import bnb_reference
import pytest
import torch

from bnb_core import ops
from bnb_core.ops.spec import OPS


@pytest.fixture
def accelerator():
    if torch.cuda.is_available():
        return torch.device("cuda")
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        return torch.device("mps")
    pytest.skip("torch sees no accelerator")


@pytest.fixture
def graphs(accelerator):
    if accelerator.type != "cuda":
        pytest.skip("this accelerator has no graphs")


def run(call):
    name, args, out = call
    bnb_reference.backend.kernels[name].function(*args, out=out)
    return out if isinstance(out, tuple) else (out,)


def assert_same(name, found, wanted):
    for a, b in zip(found, wanted):
        if OPS[name].contract == "exact":
            assert torch.equal(a.cpu(), b), name
        else:
            torch.testing.assert_close(a.cpu(), b, msg=lambda text, name=name: f"{name}: {text}")


def test_results_are_those_of_the_cpu(accelerator, dtype, calls):
    for here, there in zip(calls("cpu", dtype), calls(accelerator, dtype)):
        assert_same(here[0], run(there), run(here))


def test_special_values_are_those_of_the_cpu(accelerator, nf4, dynamic):
    special = torch.tensor([0.0, -0.0, 1e-45, -3e-41, 2.0**-126, 1.0, 3.4028234e38, -(2.0**127), float("inf"), float("nan")])
    x = special[torch.randint(0, len(special), (50_000,))].view(500, 100)
    x[:250, ::3] = torch.randn(250, 34) * 10 ** (torch.rand(250, 34) * 70 - 38)
    for op, arguments in (
        (ops.quantize_4bit, (nf4, 32)),
        (ops.quantize_blockwise, (dynamic, 3)),
        (ops.int8_quantize_rows_cols, (0.0,)),
        (ops.int8_quantize_rows_cols, (6.0,)),
    ):
        there = op(x.to(accelerator), *(a.to(accelerator) if isinstance(a, torch.Tensor) else a for a in arguments))
        for a, b in zip(there, op(x, *arguments)):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


def test_kernels_do_not_synchronize_and_can_be_captured(graphs, dtype, calls):
    for name, args, out in calls("cuda", dtype):
        wanted = [tensor.clone().cpu() for tensor in run((name, args, out))]
        for tensor in out if isinstance(out, tuple) else (out,):
            tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # an attempt to synchronize raises
            run((name, args, out))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(name, out if isinstance(out, tuple) else (out,), wanted)
