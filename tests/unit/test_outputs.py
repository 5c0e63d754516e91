"""Allocation of outputs."""

import pytest
import torch

from bnb_core.ops import outputs
from bnb_core.ops.outputs import allocator

CASES = [((3, 5), torch.bfloat16), ((), torch.float32), ((0, 4), torch.uint8), (torch.Size([7]), torch.int32)]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "general"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_allocated_is_what_torch_empty_makes(monkeypatch, fast, shape, dtype, device):
    if not fast:
        monkeypatch.setattr(outputs, "_EMPTY_STRIDED", {})
    found, expected = allocator(shape, dtype, torch.device(device))(), torch.empty(shape, dtype=dtype, device=device)
    for attribute in ("shape", "dtype", "device", "layout", "requires_grad"):
        assert getattr(found, attribute) == getattr(expected, attribute)
    assert found.stride() == expected.stride()
    assert type(found) is torch.Tensor


def test_in_inference_mode_it_is_a_tensor_of_that_mode():
    allocate = allocator((2,), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        assert allocate().is_inference()
    assert not allocate().is_inference()


@pytest.mark.parametrize(("current", "made_by"), [(1, "fast"), (0, "general")])
def test_on_another_cuda_device_than_the_current_one_torch_empty_allocates(monkeypatch, current, made_by):
    monkeypatch.setattr(outputs, "_EMPTY_STRIDED", {"cuda": lambda shape, strides, dtype: "fast"})
    monkeypatch.setattr(outputs, "_current_device", lambda: current)
    monkeypatch.setattr(torch, "empty_strided", lambda shape, strides, dtype, device: "general")
    assert allocator((2,), torch.float32, torch.device("cuda", 1))() == made_by
