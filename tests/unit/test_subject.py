"""The backend under test: what it refuses is skipped with its reason, what it gets wrong fails."""

import pytest
import torch

from bnb_core import backends
from bnb_core.backends import Backend, Support
from bnb_core.errors import OpNotSupportedError
from bnb_core.testing.calls import plain_call
from bnb_core.testing.subject import Subject


@pytest.fixture
def partial():
    """A backend with one kernel, which refuses calls of five rows."""
    backend = Backend("partial", api_version=(1, 0))
    when = lambda call: Support(len(call.a) != 5, "five rows")  # noqa: E731

    @backend.kernel("int8_matmul", devices={"cpu"}, dtypes={torch.int8}, when=when)
    def int8_matmul(a, b, *, out):
        out.copy_(a.int() @ b.int().t())

    backends.register(backend)
    return backend


FIVE_ROWS = torch.ones(5, 2, dtype=torch.int8), torch.ones(3, 2, dtype=torch.int8)


def test_device_is_one_that_the_backend_has(partial):
    cuda = Backend("cuda_only", api_version=(1, 0))
    cuda.kernel("int8_matmul", devices={"cuda"}, dtypes={torch.int8})(lambda a, b, *, out: None)
    backends.register(cuda)
    assert [Subject(name).device.type for name in ("partial", "reference", "cuda_only")] == ["cpu", "cpu", "cuda"]
    assert Subject("partial", "meta").device.type == "meta"


@pytest.mark.parametrize(("strict", "outcome"), [(False, pytest.skip.Exception), (True, pytest.fail.Exception)])
def test_missing_or_refused_is_skipped_or_fails(partial, strict, outcome):
    subject = Subject("partial", strict=strict)
    with pytest.raises(outcome, match=r"^partial does not implement gemm_4bit$"):
        subject.kernel("gemm_4bit", "float32")
    with pytest.raises(outcome, match=r"^partial refuses int8_matmul: five rows$"):
        subject.kernel("int8_matmul", "int8").verify(*FIVE_ROWS)
    with pytest.raises(outcome, match=r"^partial does not implement int8_matmul for this: meta not in \['cpu'\]$"):
        Subject("partial", "meta", strict).kernel("int8_matmul", "int8")


def test_right_kernel_passes(partial):
    Subject("partial").kernel("int8_matmul", "int8").verify(*plain_call("int8_matmul", torch.int8))


def test_wrong_kernel_fails():
    backend = Backend("wrong", api_version=(1, 0))
    backend.kernel("int8_matmul", devices={"cpu"}, dtypes={torch.int8})(lambda a, b, *, out: out.fill_(1))
    backends.register(backend)
    with pytest.raises(AssertionError, match=r"product: .* elements differ"):
        Subject("wrong").kernel("int8_matmul", "int8").verify(*plain_call("int8_matmul", torch.int8))


def test_what_a_kernel_raises_is_not_a_refusal():
    backend = Backend("broken", api_version=(1, 0))

    @backend.kernel("int8_matmul", devices={"cpu"}, dtypes={torch.int8})
    def int8_matmul(a, b, *, out):
        raise OpNotSupportedError("too late")

    backends.register(backend)
    with pytest.raises(OpNotSupportedError, match="too late"):
        Subject("broken").kernel("int8_matmul", "int8").verify(*FIVE_ROWS)


def test_no_other_backend_helps(partial, monkeypatch):
    monkeypatch.setenv("BNB_FALLBACK", "allow")
    with pytest.raises(OpNotSupportedError, match="partial: does not implement it"):
        Subject("partial").call("quantize_4bit", *plain_call("quantize_4bit", torch.float32))
    assert backends.fallbacks() == {}
