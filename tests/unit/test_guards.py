"""Guarded tensors: writes where nobody may write are found, and writes where one may are not."""

import pytest
import torch

from bnb_core.testing.guards import PLACEMENTS, Arena

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool]


@pytest.fixture(params=PLACEMENTS, ids=["aligned", "shifted"])
def arena(request):
    return Arena(request.param, torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_and_outputs_may_be_used(arena, dtype):
    source = torch.tensor([1, 0, 1, 1]).to(dtype)
    kept, changed, output = arena.copy("kept", source), arena.copy("changed", source, mutable=True), arena.empty("out", (4,), dtype)
    assert kept.tolist() == changed.tolist() == source.tolist()
    changed.zero_()
    output.copy_(kept)
    arena.check()
    assert output.tolist() == source.tolist()


@pytest.mark.parametrize("offset", [-64, -1, 3, 66])
def test_writing_around_an_output_is_found(arena, offset):
    output = arena.empty("out", (3,), torch.float16)
    output.as_strided((1,), (1,), output.storage_offset() + offset).fill_(1.0)
    with pytest.raises(AssertionError, match=rf"out: memory at element {offset} was written, which is not of the tensor's 3"):
        arena.check()


def test_one_byte_is_found(arena):
    tensor = arena.copy("x", torch.zeros(5))
    tensor.as_strided((1,), (1,), tensor.storage_offset() + 5).view(torch.uint8)[0] ^= 1
    with pytest.raises(AssertionError, match="x: memory at element 5"):
        arena.check()


def test_changed_argument_is_found(arena):
    arena.copy("x", torch.zeros(5))[2] = 1.0
    with pytest.raises(AssertionError, match="x: element 2 was written; it is an argument that may not change"):
        arena.check()


def test_gaps_between_elements_are_guarded(arena):
    tensor = arena.copy("x", torch.zeros(4, 2)[:, 0], mutable=True)
    assert tensor.stride() == (2,)
    tensor += 1
    arena.check()
    tensor.as_strided((1,), (1,), tensor.storage_offset() + 3).fill_(0.0)
    with pytest.raises(AssertionError, match="x: memory at element 3"):
        arena.check()


def test_outputs_start_as_poison_that_differs_between_placements():
    values = [Arena(placement, torch.device("cpu")).empty("out", (2,), torch.int32).tolist() for placement in PLACEMENTS]
    assert values == [[-1, -1], [0x5A5A5A5A] * 2]


def test_shifted_placement_is_aligned_to_elements_only():
    tensor = Arena(PLACEMENTS[1], torch.device("cpu")).empty("out", (2,), torch.uint8)
    assert tensor.data_ptr() % 2 == 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)], ids=str)
def test_shapes(arena, shape):
    assert arena.empty("out", shape, torch.float32).shape == shape
    arena.check()
