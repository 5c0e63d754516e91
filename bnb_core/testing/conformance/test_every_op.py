"""What holds for every op: it runs where it is declared, alone, and gives the same whoever calls it, how often and how."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Iterator, List

import pytest
import torch

from bnb_core.backends import get_backend
from bnb_core.errors import BackendError, OpNotSupportedError
from bnb_core.ops.spec import OPS, Nested
from bnb_core.testing.calls import plain_call
from bnb_core.testing.expectations import expectation
from bnb_core.testing.subject import KernelUnderTest, Results, Subject, for_ops
from bnb_core.testing.tolerances import assert_identical

#: Rows in units of 64, of 64 columns: enough elements that kernels share them among threads.
LARGE = 16
EXACT = tuple(op for op, spec in OPS.items() if spec.contract == "exact")
PRODUCTS = tuple(op for op, spec in OPS.items() if spec.contract == "product")
OPTIMIZERS = tuple(op for op, spec in OPS.items() if spec.contract == "optimizer")


@for_ops(*OPS)
def test_op_runs_where_declared_and_is_refused_elsewhere(bnb_subject: Subject, bnb_op: str, bnb_dtype: str) -> None:
    args = plain_call(bnb_op, getattr(torch, bnb_dtype))
    if bnb_subject.refusal(bnb_op, bnb_dtype):
        with pytest.raises(OpNotSupportedError, match=rf"\n  {bnb_subject.backend.name}: .+"):
            bnb_subject.call(bnb_op, *args)
    else:
        bnb_subject.kernel(bnb_op, bnb_dtype).run(*args)


@for_ops(*OPS)
def test_plain_call(bnb_kernel: KernelUnderTest) -> None:
    bnb_kernel.verify(*plain_call(bnb_kernel.spec.name, bnb_kernel.dtype))


@for_ops(*(op for op in OPS if op not in OPTIMIZERS))
def test_arguments_with_gaps(bnb_kernel: KernelUnderTest) -> None:
    args = plain_call(bnb_kernel.spec.name, bnb_kernel.dtype)
    bnb_kernel.verify(*(_with_gaps(value) for value in args))


def _with_gaps(value: Any) -> Any:
    """Return the same values with other elements between them in memory."""
    if isinstance(value, Nested):
        return Nested(_with_gaps(value.absmax), _with_gaps(value.codebook), value.offset, value.blocksize)
    if not isinstance(value, torch.Tensor):
        return value
    return torch.stack((value, value), -1)[..., 0]


@for_ops(*(op for op in PRODUCTS if op != "int8_matmul_dequant"))
def test_argument_that_requires_grad(bnb_kernel: KernelUnderTest) -> None:
    """Kernels see the tensor with its flag; the derivative is the core's."""
    args = plain_call(bnb_kernel.spec.name, bnb_kernel.dtype)
    check = expectation(bnb_kernel.spec, args)
    result = bnb_kernel.call(args[0].requires_grad_(), *args[1:])
    assert result.requires_grad
    check([result.detach()])


@for_ops(*EXACT)
def test_same_bits_as_the_reference_backend(bnb_kernel: KernelUnderTest) -> None:
    """On more elements than the oracle is asked about. Where it is not installed, or is what is tested, the oracle answers."""
    args = plain_call(bnb_kernel.spec.name, bnb_kernel.dtype, scale=64)
    try:
        get_backend("reference")
    except BackendError:
        bnb_kernel.verify(*args)
        return
    if bnb_kernel.backend.name == "reference":
        bnb_kernel.verify(*args)
        return
    reference = Subject("reference", "cpu").kernel(bnb_kernel.spec.name, str(bnb_kernel.dtype).replace("torch.", ""))
    for results in bnb_kernel.runs(*args):
        _assert_same(results, reference.run(*args))


@for_ops(*OPS)
def test_same_bits_every_time(bnb_kernel: KernelUnderTest) -> None:
    args = plain_call(bnb_kernel.spec.name, bnb_kernel.dtype, LARGE)
    first = bnb_kernel.run(*args)
    for _ in range(3):
        _assert_same(bnb_kernel.run(*args), first)


@for_ops(*EXACT, *OPTIMIZERS)
def test_same_bits_with_any_number_of_threads(bnb_kernel: KernelUnderTest) -> None:
    args = plain_call(bnb_kernel.spec.name, bnb_kernel.dtype, LARGE)
    with _threads(1):
        first = bnb_kernel.run(*args)
    for count in (2, 3):
        with _threads(count):
            _assert_same(bnb_kernel.run(*args), first)


@for_ops(*PRODUCTS)
def test_product_with_any_number_of_threads(bnb_kernel: KernelUnderTest) -> None:
    args = plain_call(bnb_kernel.spec.name, bnb_kernel.dtype, LARGE)
    check = expectation(bnb_kernel.spec, args)
    for count in (1, 2, 3):
        with _threads(count):
            check(bnb_kernel.run(*args))


@for_ops(*OPS)
def test_two_callers_at_once(bnb_kernel: KernelUnderTest) -> None:
    calls = [plain_call(bnb_kernel.spec.name, bnb_kernel.dtype, scale) for scale in (2, 4)]
    alone = [bnb_kernel.run(*args) for args in calls]
    with ThreadPoolExecutor(2) as pool:
        together: List[List[Results]] = list(pool.map(lambda args: [bnb_kernel.run(*args) for _ in range(4)], calls))
    for expected, found in zip(alone, together):
        for results in found:
            _assert_same(results, expected)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _assert_same(results: Results, expected: Results) -> None:
    for at, (actual, other) in enumerate(zip(results, expected)):
        for tensor, expected_tensor in zip(*((item if isinstance(item, list) else [item]) for item in (actual, other))):
            assert_identical(tensor, expected_tensor, f"result {at}")
