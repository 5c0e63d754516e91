"""QuantState in memory, and as checkpoints have it, damaged and hostile ones included."""

import copy
import json
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from bnb_core import functional as F
from bnb_core.errors import CheckpointError, InvalidArgumentError
from bnb_core.ops import Nested
from bnb_core.quantization import QuantState


def make_state(nested=False, quant_type="nf4", shape=(13, 21), blocksize=32):
    return F.quantize_4bit(torch.randn(shape), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)[1]


def same(a, b):
    """To the bit, unlike `==`."""
    plain = ("shape", "dtype", "blocksize", "quant_type", "nested")
    tensors = ("absmax", "code", "offset")
    if a is None or b is None:
        return a is b
    return (
        all(getattr(a, name) == getattr(b, name) for name in plain)
        and all(
            (getattr(a, name) is None and getattr(b, name) is None) or torch.equal(getattr(a, name), getattr(b, name))
            for name in tensors
        )
        and same(a.state2, b.state2)
    )


nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
packed_or_not = pytest.mark.parametrize("packed", [False, True], ids=["dict", "packed"])


@nested_or_not
def test_attributes(nested):
    state = make_state(nested)
    blocks = -(-13 * 21 // 32)
    assert state.shape == torch.Size([13, 21])
    assert state.dtype == torch.float32
    assert state.blocksize == 32
    assert state.quant_type == "nf4"
    assert state.nested is nested
    assert state.absmax.shape == (blocks,)
    assert state.absmax.dtype == (torch.uint8 if nested else torch.float32)
    if nested:
        assert state.offset.shape == ()
        assert state.offset.dtype == torch.float32
        assert state.state2.absmax.shape == (1,)
        assert state.state2.blocksize == 256
        assert state.state2.code.shape == (256,)
        assert state.state2.dtype == torch.float32
    else:
        assert state.offset is None
        assert state.state2 is None


def test_nested_statistics_are_the_ops_argument():
    assert make_state().nested_statistics is None
    state = make_state(nested=True)
    nested = state.nested_statistics
    assert isinstance(nested, Nested)
    assert nested.blocksize == 256
    assert nested.absmax is state.state2.absmax
    assert nested.codebook is state.state2.code
    assert nested.offset is state.offset
    state.offset = state.offset.to(torch.bfloat16)  # as a model cast as a whole has it
    assert state.nested_statistics.offset.dtype == torch.float32
    state.offset = None
    with pytest.raises(InvalidArgumentError, match="offset is None"):
        _ = state.nested_statistics


def test_statistics_can_be_flattened_by_hand():
    packed, state = F.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
    before = F.dequantize_4bit(packed, state)
    state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.offset, state.state2 = False, None, None
    assert torch.equal(F.dequantize_4bit(packed, state), before)


@nested_or_not
def test_list_layout(nested):
    state = make_state(nested)
    assert state[0] is state.absmax
    assert state[1] == state.shape
    assert state[2] == state.dtype
    assert state[3] == 32
    assert state[5] == state[-1] == "nf4"
    assert state[4] == ([state.offset, state.state2] if nested else None)
    assert len(state[:]) == 6
    with pytest.raises(IndexError):
        state[6]


@nested_or_not
def test_equality(nested):
    state = make_state(nested)
    assert state == copy.deepcopy(state)
    assert state != make_state(nested, "fp4")
    assert state != make_state(nested, shape=(21, 13))
    assert state != "nf4"
    assert make_state(True) != make_state(False)
    other = copy.deepcopy(state)
    other.absmax = other.absmax[:-1]
    assert state != other
    other = copy.deepcopy(state)
    other.absmax[0] += 1
    assert state != other
    with pytest.raises(TypeError):
        hash(state)


def test_states_with_nan_equal_themselves():
    x = torch.randn(64)
    x[3] = float("nan")
    _, state = F.quantize_4bit(x)
    assert state == copy.deepcopy(state)


@nested_or_not
def test_copies_and_pickles(nested):
    state = make_state(nested)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert same(state, other)
        assert other.absmax.data_ptr() != state.absmax.data_ptr()


@nested_or_not
def test_to_moves_every_tensor_in_place(nested):
    state = make_state(nested)
    assert state.to("meta") is state
    tensors = [state.absmax, state.code] + ([state.offset, state.state2.absmax, state.state2.code] if nested else [])
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_repr_shows_no_tensor():
    assert repr(make_state(True)) == "QuantState(nf4, shape=[13, 21], torch.float32, blocksize=32, nested)"


def test_packed_attribute():
    state = make_state()
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    for name in ("bitsandbytes__fp4", "absent"):
        with pytest.raises(AttributeError, match=name):
            getattr(state, name)


# ------------------------------------------------------------------------------------------------------------------ checkpoints


@packed_or_not
@nested_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "af4"])
def test_round_trip(packed, nested, dtype, quant_type):
    _, state = F.quantize_4bit(torch.randn(5, 67).to(dtype), compress_statistics=nested, quant_type=quant_type)
    entries = state.as_dict(packed=packed)
    before = dict(entries)
    assert same(QuantState.from_dict(entries, "cpu"), state)
    assert entries == before, "the caller's dict changed"
    assert all(isinstance(value, torch.Tensor) for value in entries.values()) or not packed


@packed_or_not
@nested_or_not
def test_round_trip_of_an_8_bit_state(packed, nested):
    _, state = F.quantize_blockwise(torch.randn(700), blocksize=100, nested=nested)
    assert same(QuantState.from_dict(state.as_dict(packed=packed), "cpu"), state)


def test_round_trip_of_an_empty_tensor():
    for nested in (False, True):
        state = make_state(nested, shape=(0, 4))
        assert same(QuantState.from_dict(state.as_dict(packed=True), "cpu"), state)


def test_not_finite_offsets_survive():
    x = torch.randn(128)
    for value in (float("nan"), float("inf")):
        x[0] = value
        _, state = F.quantize_4bit(x, compress_statistics=True)
        loaded = QuantState.from_dict(state.as_dict(packed=True), "cpu")
        assert torch.equal(loaded.offset.isnan(), state.offset.isnan())
        assert loaded == state


def test_packed_json_is_that_of_bitsandbytes():
    saved = make_state(nested=True).as_dict(packed=True)
    assert list(saved) == [
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"),
    ]
    text = bytes(saved["quant_state.bitsandbytes__nf4"].tolist()).decode()
    offset = json.loads(text)["nested_offset"]
    assert text == (
        '{"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [13, 21], '
        f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )


def test_saved_tensors_share_no_memory():
    state = make_state(nested=True)
    saved = state.as_dict(packed=True)
    assert saved["nested_quant_map"].data_ptr() != state.state2.code.data_ptr()


def test_prefixes_are_stripped():
    state = make_state(nested=True)
    saved = {f"model.layers.3.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert same(QuantState.from_dict(saved, "cpu"), state)


def test_incomplete_states_are_not_saved():
    with pytest.raises(InvalidArgumentError, match="code is None"):
        QuantState(torch.ones(1), blocksize=64, dtype=torch.float32).as_dict()


def pack(value, quant_type="nf4"):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return {f"quant_state.bitsandbytes__{quant_type}": torch.tensor(list(text), dtype=torch.uint8)}


def damaged(nested=True, **changes):
    """Unpacked entries of a [13, 21] tensor, changed; None removes an entry."""
    entries = {**make_state(nested).as_dict(), **changes}
    return {key: value for key, value in entries.items() if value is not REMOVED}


REMOVED = object()
F32 = torch.float32

HOSTILE = {
    "nothing": (dict, "absmax, quant_map, quant_type, blocksize, dtype, shape missing; found nothing"),
    "no absmax": (lambda: damaged(absmax=REMOVED), "absmax missing"),
    "half nested": (lambda: damaged(nested_quant_map=REMOVED), "nested_quant_map missing"),
    "nested entries of a plain state": (lambda: damaged(False, nested_offset=0.5), "nested_absmax, nested_quant_map"),
    "unknown entry": (lambda: damaged(bias=torch.ones(3)), "unknown entry 'bias'"),
    "two tensors at once": (lambda: {**damaged(), "other.absmax": torch.ones(9)}, "two entries named 'absmax'"),
    "absmax too short": (lambda: damaged(absmax=torch.zeros(8, dtype=torch.uint8)), r"absmax is torch.uint8 \[8\].*\[9\]"),
    "absmax too long": (lambda: damaged(False, absmax=torch.zeros(10)), r"torch.float32 \[9\]"),
    "absmax as a matrix": (lambda: damaged(False, absmax=torch.zeros(3, 3)), r"\[3, 3\]"),
    "absmax in bfloat16": (lambda: damaged(False, absmax=torch.zeros(9, dtype=torch.bfloat16)), "torch.bfloat16"),
    "absmax not nested": (lambda: damaged(absmax=torch.zeros(9)), r"absmax is torch.float32.*torch.uint8 \[9\]"),
    "absmax a list": (lambda: damaged(absmax=[0] * 9), "absmax is a list; it must be a tensor"),
    "short codebook": (lambda: damaged(quant_map=torch.zeros(15)), r"quant_map is torch.float32 \[15\].*\[16\]"),
    "8-bit codebook": (lambda: damaged(quant_map=torch.zeros(256)), r"\[16\]"),
    "half codebook": (lambda: damaged(quant_map=torch.zeros(16, dtype=torch.float16)), "quant_map is torch.float16"),
    "short nested codebook": (lambda: damaged(nested_quant_map=torch.zeros(255)), r"nested_quant_map .*\[256\]"),
    "nested absmax too long": (lambda: damaged(nested_absmax=torch.zeros(2)), r"nested_absmax .*\[1\]"),
    "unknown type": (lambda: damaged(quant_type="mxfp4"), "no codebook 'mxfp4'"),
    "8-bit type": (lambda: damaged(quant_type="dynamic"), "quant_type is 'dynamic'; it must be a 4-bit type"),
    "type not a string": (lambda: damaged(quant_type=["nf4"]), r"quant_type is \['nf4'\]"),
    "blocksize 48": (lambda: damaged(blocksize=48), "blocksize is 48; it must be one of 32, 64"),
    "blocksize 0": (lambda: damaged(blocksize=0), "blocksize is 0"),
    "blocksize true": (lambda: damaged(blocksize=True), "blocksize is True"),
    "blocksize a string": (lambda: damaged(blocksize="64"), "blocksize is '64'"),
    "nested blocksize 0": (lambda: damaged(nested_blocksize=0), "nested_blocksize is 0; it must be positive"),
    "nested blocksize wrong": (lambda: damaged(nested_blocksize=4), r"nested_absmax .*\[3\]"),
    "dtype int8": (lambda: damaged(dtype="int8"), "dtype is 'int8'; it must be 'float32' or 'float16' or 'bfloat16'"),
    "dtype a function of torch": (lambda: damaged(dtype="load"), "dtype is 'load'"),
    "nested dtype": (lambda: damaged(nested_dtype="float16"), "nested_dtype is 'float16'; it must be 'float32'"),
    "offset a string": (lambda: damaged(nested_offset="0.1"), "nested_offset is '0.1'"),
    "offset too large": (lambda: damaged(nested_offset=1e300), "nested_offset is 1e\\+300"),
    "shape missing": (lambda: damaged(shape=None), "shape is None; it must be a list of sizes"),
    "shape of fractions": (lambda: damaged(shape=[13.0, 21]), r"shape is \[13.0, 21\]"),
    "shape negative": (lambda: damaged(shape=[-13, -21]), r"shape is \[-13, -21\]"),
    "shape too large": (lambda: damaged(shape=[2**40, 2**40]), r"absmax is torch.uint8 \[9\]"),
    "shape over 64 bits": (lambda: damaged(shape=[10**400, 0]), "list of sizes"),
    "two packed entries": (lambda: {**pack({}), **pack({}, "fp4")}, r"several quant types \('nf4', 'fp4'\)"),
    "packed not bytes": (lambda: {"quant_state.bitsandbytes__nf4": torch.zeros(9)}, "bitsandbytes__nf4 is torch.float32"),
    "packed a dict": (lambda: {"quant_state.bitsandbytes__nf4": {}}, "is a dict; it must be a tensor"),
    "packed on meta": (
        lambda: {"quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8, device="meta")},
        "on the meta device",
    ),
    "packed huge": (lambda: pack(b" " * 20000), "20000 bytes"),
    "packed empty": (lambda: pack(b""), "is not JSON"),
    "packed not UTF-8": (lambda: pack(b"\xff\xfe"), "is not JSON"),
    "packed cut off": (lambda: pack(b'{"quant_type": "nf4'), "is not JSON"),
    "packed deep": (lambda: pack(b"[" * 16000), "is not JSON"),
    "packed a list": (lambda: pack([]), "is a JSON list"),
    "packed null": (lambda: pack(None), "is a JSON NoneType"),
    "packed tensor": (lambda: pack({"quant_type": "nf4", "absmax": [1.0]}), "holds 'absmax', which is unknown there"),
    "packed twice": (lambda: {**damaged(), **pack({"quant_type": "nf4"})}, "holds 'quant_type', which is given twice"),
    "packed of another type": (lambda: pack({"quant_type": "fp4"}), "says quant_type 'fp4'"),
    "packed a huge number": (lambda: pack(b'{"blocksize": ' + b"9" * 10000 + b"}"), "not JSON|says quant_type None"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_checkpoints_are_refused(name):
    build, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message):
        QuantState.from_dict(build(), "cpu")


def test_nothing_is_allocated_for_a_damaged_checkpoint():
    # The meta device would accept any size, so that only the checks can refuse it.
    entries = damaged(False, shape=[2**31, 2**31])
    with pytest.raises(CheckpointError, match="absmax"):
        QuantState.from_dict(entries, "meta")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
packed_keys = st.sampled_from(
    ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "absmax", "x"]
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.dictionaries(packed_keys, json_values, max_size=3))
def test_any_json_either_loads_or_is_refused(changes):
    text = {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [13, 21], **changes}
    entries = {"absmax": torch.ones(9), "quant_map": F.get_4bit_type("nf4", "cpu"), **pack(text)}
    try:
        state = QuantState.from_dict(entries, "cpu")
    except CheckpointError:
        return
    assert F.dequantize_4bit(torch.zeros(137, dtype=torch.uint8), state).shape == state.shape
