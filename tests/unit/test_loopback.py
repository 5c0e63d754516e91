"""The loopback backend: another backend's results, and a record of the calls."""

import torch

from bnb_core import backends, ops
from bnb_core.testing.calls import plain_call
from bnb_core.testing.loopback import Loopback
from bnb_core.testing.subject import Subject


def test_forwards_and_records():
    loopback = Loopback()
    backends.register(loopback.backend)
    a, b = plain_call("int8_matmul", torch.int8)
    with backends.use_backend("loopback"):
        product = ops.int8_matmul(a, b)
    assert loopback.calls == ["int8_matmul"]
    assert torch.equal(product, a.int() @ b.int().t())


def test_has_every_kernel_of_the_inner_backend():
    inner, outer = backends.get_backend("reference"), Loopback().backend
    described = [
        {op: (kernel.devices, kernel.dtypes, kernel.when, kernel.scratch) for op, kernel in backend.kernels.items()}
        for backend in (inner, outer)
    ]
    assert described[0] == described[1]


def test_is_not_chosen_by_itself():
    loopback = Loopback()
    backends.register(loopback.backend)
    ops.int8_matmul(*plain_call("int8_matmul", torch.int8))
    assert loopback.calls == []


def test_wrapper_takes_the_place_of_a_kernel():
    def negated(original):
        def kernel(a, b, *, out):
            original(a, b, out=out)
            out.neg_()

        return kernel

    backends.register(Loopback("wrong", wrappers={"int8_matmul": negated}).backend)
    a, b = plain_call("int8_matmul", torch.int8)
    with backends.use_backend("wrong"):
        assert torch.equal(ops.int8_matmul(a, b), -(a.int() @ b.int().t()))


def test_conformance_runs_on_the_backend_and_on_no_other(monkeypatch):
    monkeypatch.setenv("BNB_BACKEND", "reference")
    loopback = Loopback()
    backends.register(loopback.backend)
    kernel = Subject("loopback").kernel("quantize_4bit", "float16")
    kernel.verify(*plain_call("quantize_4bit", torch.float16))
    assert loopback.calls == ["quantize_4bit"] * 2  # once for each placement in memory
