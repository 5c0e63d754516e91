"""`Layouts`: what it says of tensors that have changed, with torch's guards and without them."""

import pytest
import torch

from bnb_core.ops import layouts
from bnb_core.ops.layouts import Layouts


@pytest.fixture(params=["guards", "comparison"], autouse=True)
def way(request, monkeypatch):
    if request.param == "comparison":
        monkeypatch.setattr(layouts, "_guards_of", None)
    elif layouts._guards_of is None:
        pytest.skip("this torch has no guards that can be used")


def known(*tensors):
    found = Layouts(tensors)
    for _ in range(2):  # once by comparison, then by whatever is faster
        assert found.hold_for(list(tensors))
    return found


CHANGES = {
    "dtype": lambda t: t.half(),
    "dtype of the same size": lambda t: t.view(torch.int32),
    "shape": lambda t: torch.zeros(2, 4),
    "strides": lambda t: torch.zeros(4, 4).t(),
    "gaps": lambda t: torch.zeros(4, 8)[:, ::2],
    "device": lambda t: t.to("meta"),
    "type": lambda t: torch.nn.Parameter(t),
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_one_tensor_is_seen(change):
    first, second = torch.zeros(3), torch.zeros(4, 4)
    assert not known(first, second).hold_for([first, change(second)])


def test_other_tensors_of_the_same_layout_are_as_good():
    assert known(torch.zeros(3), torch.zeros(4, 4).t()).hold_for([torch.ones(3), torch.ones(4, 4).t()])


def test_a_change_in_place_is_seen():
    tensor = torch.zeros(2, 3)
    found = known(tensor)
    tensor.data = tensor.data.t()
    assert not found.hold_for([tensor])


def test_what_is_no_part_of_a_layout_does_not_count():
    tensor = torch.zeros(3)
    found = known(tensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert found.hold_for([tensor])
    assert found.hold_for([tensor.requires_grad_()])
    assert found.hold_for([tensor])
    with torch.no_grad():
        assert found.hold_for([tensor])
