"""Quantized states go to bitsandbytes and back through its own format."""

import json

import pytest
import torch

import bnb_core as bnb
from bnb_core import functional as F

bitsandbytes = pytest.importorskip("bitsandbytes")
Peer = bitsandbytes.functional

nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["dict", "packed"])


def same_entries(a, b):
    assert list(a) == list(b)
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key
        else:
            assert (type(value), value) == (type(b[key]), b[key]), key


@pytest.mark.parametrize("quantize", ["quantize_nf4", "quantize_fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(77,), (64, 64), (2, 3, 33)], ids=str)
@nested_or_not
@packed_or_not
def test_there_and_back(quantize, dtype, shape, nested, packed):
    x = torch.randn(shape).to(dtype)
    ours = getattr(F, quantize)(x, compress_statistics=nested)[1]
    theirs = getattr(Peer, quantize)(x, compress_statistics=nested)[1]
    for state in (ours, theirs):
        entries = state.as_dict(packed=packed)
        here = bnb.QuantState.from_dict(dict(entries), "cpu")
        there = Peer.QuantState.from_dict(dict(entries), "cpu")
        same_entries(here.as_dict(packed=packed), entries)
        same_entries(there.as_dict(packed=packed), entries)
        for name in ("shape", "dtype", "blocksize", "quant_type", "nested"):
            assert getattr(here, name) == getattr(there, name)


@nested_or_not
@packed_or_not
def test_8_bit_states_there_and_back(nested, packed):
    for library in (F, Peer):
        _, state = library.quantize_blockwise(torch.randn(1000), blocksize=100, nested=nested)
        entries = state.as_dict(packed=packed)
        same_entries(bnb.QuantState.from_dict(dict(entries), "cpu").as_dict(packed=packed), entries)
        same_entries(Peer.QuantState.from_dict(dict(entries), "cpu").as_dict(packed=packed), entries)


@pytest.mark.parametrize("shape", [(0,), (1,), (2**31 - 1, 3), ()], ids=str)
@pytest.mark.parametrize("offset", [0.0, -0.0, 1e-45, 0.1, 3.4028234663852886e38, float("inf"), float("nan")])
def test_packed_json_has_the_same_bytes(shape, offset):
    arguments = {
        "absmax": torch.zeros(1, dtype=torch.uint8),
        "shape": torch.Size(shape),
        "code": torch.zeros(16),
        "blocksize": 64,
        "quant_type": "nf4",
        "dtype": torch.bfloat16,
        "offset": torch.tensor(offset),
    }
    second = {"absmax": torch.zeros(1), "code": torch.zeros(256), "blocksize": 256, "dtype": torch.float32}
    ours = bnb.QuantState(**arguments, state2=bnb.QuantState(**second)).as_dict(packed=True)
    theirs = Peer.QuantState(**arguments, state2=Peer.QuantState(**second)).as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    assert bytes(ours[key].tolist()) == bytes(theirs[key].tolist())
    assert json.loads(bytes(ours[key].tolist()))["shape"] == list(shape)


@nested_or_not
def test_list_layout(nested):
    _, theirs = Peer.quantize_4bit(torch.randn(64, 64), compress_statistics=nested)
    ours = bnb.QuantState.from_dict(theirs.as_dict(), "cpu")
    assert torch.equal(ours[0], theirs[0])
    assert ours[1:4] == theirs[1:4]
    assert ours[5] == theirs[5]
    assert (ours[4] is None) == (theirs[4] is None)
    if nested:
        assert ours[4][0] == theirs[4][0]
        assert torch.equal(ours[4][1].absmax, theirs[4][1].absmax)


def test_same_attributes_and_arguments():
    import inspect

    assert (
        inspect.signature(bnb.QuantState.__init__).parameters.keys()
        == inspect.signature(Peer.QuantState.__init__).parameters.keys()
    )
    _, ours = F.quantize_4bit(torch.randn(64), compress_statistics=True)
    _, theirs = Peer.quantize_4bit(torch.randn(64), compress_statistics=True)
    assert vars(ours).keys() == vars(theirs).keys()
    for name in ("valid_quant_types", "valid_qs_type_keys", "valid_qs_keys"):
        assert set(getattr(bnb.QuantState, name)) == set(getattr(Peer.QuantState, name))


def test_deviation_damaged_checkpoints_are_refused():
    """bitsandbytes takes any scales and any shape, and reads beside them later."""
    _, theirs = Peer.quantize_nf4(torch.randn(64, 64))
    entries = theirs.as_dict(packed=True)
    entries["absmax"] = entries["absmax"][:10]
    assert Peer.QuantState.from_dict(dict(entries), "cpu").absmax.numel() == 10
    with pytest.raises(bnb.errors.CheckpointError, match="absmax"):
        bnb.QuantState.from_dict(entries, "cpu")
