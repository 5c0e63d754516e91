"""Parametrized 4-bit parameters against those of bitsandbytes: the same codes, values and state dicts."""

import pytest
import torch

from bnb_core.nn import parametrize

peer = pytest.importorskip("bitsandbytes.nn.parametrize")

SETTINGS = [("nf4", False, None), ("nf4", True, 64), ("fp4", False, 128), ("fp4", True, 256)]
settings = pytest.mark.parametrize(("quant_type", "nested", "blocksize"), SETTINGS, ids=str)
SHAPES = {
    "linear": (6, 256),
    "experts": (4, 3, 256),
    "conv2d": (2, 3, 2, 256),
}  # rows that bitsandbytes dequantizes rightly on CPUs


def module_with(shape):
    module = torch.nn.Module()
    module.table = torch.nn.Parameter(torch.randn(shape))
    return module


def pair(shape, quant_type, nested, blocksize):
    modules = [module_with(shape), module_with(shape)]
    modules[1].load_state_dict(modules[0].state_dict())
    for library, module in zip((parametrize, peer), modules):
        library.replace_parameter_4bit(module, "table", nested, quant_type, blocksize)
    return modules


@settings
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_codes_and_state_dicts_are_the_same(shape, quant_type, nested, blocksize):
    ours, theirs = (module.state_dict() for module in pair(shape, quant_type, nested, blocksize))
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        if not nested or name in ("table", "table.quant_map", "table.nested_quant_map"):
            # bitsandbytes' nested offset, a mean in float32, may differ in its last bit, and with it whatever follows from it.
            assert torch.equal(value, theirs[name]), name


@settings
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_of_their_state_dict_are_the_same(shape, quant_type, nested, blocksize):
    _, theirs = pair(shape, quant_type, nested, blocksize)
    ours = module_with(shape)
    parametrize.replace_parameter_4bit(ours, "table")
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.table
    if nested:  # scales are dequantized with two roundings here, which bitsandbytes may contract into one
        torch.testing.assert_close(ours.table, expected, rtol=2**-22, atol=0)
    else:
        assert torch.equal(ours.table, expected)


@settings
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_they_read_our_state_dict(shape, quant_type, nested, blocksize):
    ours, _ = pair(shape, quant_type, nested, blocksize)
    entries = ours.state_dict()
    theirs = torch.nn.Module()
    theirs.table = torch.nn.Parameter(entries.pop("table"), requires_grad=False)
    statistics = {name[len("table.") :]: value for name, value in entries.items()}
    peer.replace_parameter_4bit_prequantized(theirs, "table", statistics, torch.device("cpu"))
    torch.testing.assert_close(theirs.table, ours.table, rtol=2**-22, atol=0)
    again = module_with(shape)
    again.table = torch.nn.Parameter(theirs.state_dict()["table"], requires_grad=False)
    statistics = {name[len("table.") :]: value for name, value in theirs.state_dict().items() if name != "table"}
    parametrize.replace_parameter_4bit_prequantized(again, "table", statistics, torch.device("cpu"))
    assert torch.equal(again.table, ours.table)
