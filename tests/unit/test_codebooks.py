"""Codebooks: values that never change, names, and what plugins add."""

import hashlib

import pytest
import torch

import bnb_core
from bnb_core import backends
from bnb_core import functional as F
from bnb_core.errors import InvalidArgumentError
from bnb_core.quantization import codebooks, get_codebook


def digest(table):
    assert table.dtype == torch.float32
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16]


# Of bitsandbytes 0.50.2's tables on a CPU with a fused multiply-add.
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (F.create_dynamic_map, "e732639a65f497b4"),
        (lambda: F.create_dynamic_map(signed=False), "305f002cc11278fb"),
        (F.create_linear_map, "80bf4c55fa736fa1"),
        (lambda: F.create_linear_map(signed=False), "7cb9ea560989533d"),
    ],
    ids=["dynamic", "udynamic", "linear", "ulinear"],
)
def test_maps_are_the_same_bytes_on_every_machine(build, expected):
    assert digest(build()) == expected


def test_dynamic_map_is_symmetric_but_for_its_end():
    table = F.create_dynamic_map()
    assert table[127] == 0
    assert table[255] == 1
    assert torch.equal(-table[:127].flip(0), table[128:255])
    assert (table[1:] > table[:-1]).all()


def test_unsigned_dynamic_map_has_no_negative_value():
    table = F.create_dynamic_map(signed=False)
    assert table[0] == 0
    assert table[255] == 1
    assert (table[1:] > table[:-1]).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_maps_have_that_many_values_and_are_filled_up_with_zeros(signed, bits):
    dynamic = F.create_dynamic_map(signed, bits - 1, bits)
    assert (dynamic[1:] >= dynamic[:-1]).all()
    assert dynamic[255] == 1
    assert dynamic.unique().numel() == 2**bits
    assert (dynamic == 0).sum() == 257 - 2**bits
    linear = F.create_linear_map(signed, bits)
    steps = 2**bits - 1 - signed
    expected = torch.arange(steps + 1) * ((1.0 + signed) / steps) - float(signed)
    filled = 255 - steps  # zeros in the middle
    torch.testing.assert_close(torch.cat([linear[: (steps + 1) // 2], linear[(steps + 1) // 2 + filled :]]), expected)
    assert (linear[(steps + 1) // 2 :][:filled] == 0).all()


def test_linear_map_without_zero_uses_all_codes():
    table = F.create_linear_map(add_zero=False)
    assert table.unique().numel() == 256
    assert 0 not in table


def test_nf4_is_the_normal_map():
    normal = F.create_normal_map()
    nf4 = F.get_4bit_type("nf4", "cpu")
    assert torch.equal(normal.unique(), nf4)
    assert F.create_normal_map(use_extra_value=False).unique().numel() == 15


def test_float_maps_have_the_values_of_their_bits():
    magnitudes = torch.tensor([0, 1 / 16, 1 / 2, 3 / 4, 1, 3 / 2, 2, 3]) / 3  # two exponent bits, one fraction bit
    assert torch.equal(F.create_fp8_map(True, 2, 1, 4).unique(), torch.cat([-magnitudes, magnitudes]).unique())
    assert torch.equal(F.create_fp8_map(False, 2, 1, 3).unique(), magnitudes)
    # Five exponent bits: from 1.75 * 2^16 down to 0.25 * 2^-16, which is 2^-34 / 1.75 of it.
    table = F.create_fp8_map()
    assert table[255] == 1
    assert table[table > 0].min() == torch.tensor(2.0**-34) / 1.75


def test_fp4_negatives_mirror_its_positives():
    fp4 = F.get_4bit_type("fp4", "cpu")
    assert torch.equal(fp4[8:], -fp4[:8])
    assert not torch.signbit(fp4[8])


def test_int4_is_evenly_spaced():
    expected = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]) / 7.0
    assert torch.equal(F.get_4bit_type("int4", "cpu"), expected)


def test_af4_is_for_one_blocksize():
    af4 = F.get_4bit_type("af4", "cpu")
    assert af4[0] == 1
    assert af4[15] == -1
    assert (af4[1:] < af4[:-1]).all()
    with pytest.raises(InvalidArgumentError, match="blocksize is 128"):
        F.get_4bit_type("af4", "cpu", blocksize=128)


def test_default_device_is_the_accelerator_if_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert F.get_4bit_type("nf4").device.type == expected
    assert F.get_4bit_type("nf4", "meta").device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.create_dynamic_map(total_bits=9), "total_bits is 9"),
        (lambda: F.create_dynamic_map(True, 0), "at least 1"),
        (lambda: F.create_dynamic_map(False, 6), "total_bits - 1 = 7"),
        (lambda: F.create_linear_map(total_bits=1), "total_bits is 1"),
        (lambda: F.create_fp8_map(True, 4, 2), "4 exponent and 2 precision bits and a sign do not make 8"),
        (lambda: F.create_fp8_map(False, 0, 8), "1 to 7 exponent bits"),
        (lambda: F.create_fp8_map(False, 8, 0), "1 to 7 exponent bits"),
        (lambda: F.create_normal_map(offset=1.0), "offset is 1.0"),
        (lambda: F.create_normal_map(offset=float("nan")), "offset is nan"),
        (lambda: F.get_4bit_type("nf5", "cpu"), "no codebook 'nf5' with 16 values; there are 'nf4', 'fp4', 'af4', 'int4'$"),
        (lambda: F.get_4bit_type("dynamic", "cpu"), "no codebook 'dynamic' with 16 values"),
        (lambda: F.quantize_4bit(torch.ones(4), quant_type="q4_k"), "no codebook 'q4_k' with 16 values"),
        (lambda: F.quantize_4bit(torch.ones(4), quant_type=None), "no codebook None"),
        (lambda: get_codebook("nonsense"), "'udynamic'"),
    ],
)
def test_bad_arguments_name_what_is_accepted(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


class Plugin:
    """Codebooks of a third party."""

    def __init__(self, tables):
        self.tables = tables
        backend = backends.Backend("acme", api_version=(1, 0))
        self.bnb_backends = backends.hookimpl(lambda: [backend])
        self.bnb_codebooks = backends.hookimpl(lambda: self.tables)


SYMMETRIC = [i / 7.5 - 1 for i in range(16)]


def test_plugin_codebooks_are_found_by_name():
    backends.register(Plugin({"sym4": SYMMETRIC, "ramp": [i / 255 for i in range(256)]}), name="acme")
    x = torch.randn(7, 33)
    packed, state = F.quantize_4bit(x, quant_type="sym4", blocksize=32)
    assert torch.equal(state.code, torch.tensor(SYMMETRIC))
    assert (F.dequantize_4bit(packed, state) - x).abs().max() <= x.abs().max() / 15 * 1.001
    assert get_codebook("ramp").numel() == 256
    with pytest.raises(InvalidArgumentError, match="'ramp' with 16 values"):
        F.quantize_4bit(x, quant_type="ramp")
    loaded = bnb_core.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert loaded.quant_type == "sym4"
    assert torch.equal(loaded.code, state.code)


def test_plugin_codebooks_go_with_the_plugin():
    backends.register(Plugin({"sym4": SYMMETRIC}), name="acme")
    _, state = F.quantize_4bit(torch.ones(4), quant_type="sym4")
    saved = state.as_dict(packed=True)
    backends.unregister("acme")
    with pytest.raises(InvalidArgumentError, match="no codebook 'sym4'"):
        F.quantize_4bit(torch.ones(4), quant_type="sym4")
    with pytest.raises(bnb_core.errors.CheckpointError, match=r"'sym4'.*plugin"):
        bnb_core.QuantState.from_dict(saved, "cpu")


def test_a_plugin_cannot_redefine_nf4():
    nf4 = get_codebook("nf4")
    backends.register(Plugin({"nf4": SYMMETRIC}), name="acme")
    assert torch.equal(get_codebook("nf4"), nf4)


def test_plugin_codebook_of_another_length_is_refused():
    backends.register(Plugin({"odd": [0.0, 1.0, 2.0]}), name="acme")
    with pytest.raises(InvalidArgumentError, match="'odd' of backend 'acme' has 3 values"):
        get_codebook("odd")


def test_a_state_owns_its_codebook():
    _, state = F.quantize_4bit(torch.randn(64), quant_type="nf4", compress_statistics=True)
    state.code.zero_()
    state.state2.code.zero_()
    _, again = F.quantize_4bit(torch.randn(64), quant_type="nf4", compress_statistics=True)
    assert torch.equal(again.code, get_codebook("nf4"))
    assert torch.equal(again.state2.code, get_codebook("dynamic"))


def test_codebooks_made_in_inference_mode_serve_training_later():
    weight = torch.randn(8, 64)
    with torch.inference_mode():
        F.quantize_4bit(weight)
    packed, state = F.quantize_4bit(weight)
    x = torch.randn(2, 64, requires_grad=True)
    bnb_core.matmul_4bit(x, packed, state).sum().backward()
    assert x.grad.shape == x.shape
    assert not codebooks.shared_codebook("fp4", torch.device("cpu"), 16).is_inference()


def test_no_traced_tensor_stays_in_the_cache():
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    if not bnb_core.ops.plain.REGISTERED:
        pytest.skip("fake tensors reach kernels only where ops are registered with torch")
    with fake.FakeTensorMode():
        F.quantize_4bit(torch.empty(64))
    _, state = F.quantize_4bit(torch.ones(64))
    assert type(state.code) is torch.Tensor
