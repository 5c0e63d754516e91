"""The codebooks are those of bitsandbytes, bit for bit."""

import pytest
import torch

from bnb_core import functional as F

bitsandbytes = pytest.importorskip("bitsandbytes")
Peer = bitsandbytes.functional

# bitsandbytes' tables are torch.linspace's, which rounds differently on CPUs without a fused multiply-add.
fused = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch.linspace rounds differently on this CPU"
)


def both(name, *args):
    return getattr(F, name)(*args), getattr(Peer, name)(*args)


@fused
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic_map(signed, bits):
    for exponents in range(1, 9) if signed else [bits - 1]:
        assert torch.equal(*both("create_dynamic_map", signed, exponents, bits))


@fused
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_linear_map(signed, bits):
    for add_zero in (True, False):
        assert torch.equal(*both("create_linear_map", signed, bits, add_zero))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_float_map(signed, bits):
    for exponent_bits in range(1, min(7, bits - signed) + 1):
        assert torch.equal(*both("create_fp8_map", signed, exponent_bits, bits - signed - exponent_bits, bits))


@fused
@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("offset", [0.9677083, 0.6, 0.75, 0.9, 0.99, 0.9999])
def test_normal_map(offset, extra):
    pytest.importorskip("scipy")  # which bitsandbytes computes it with
    assert torch.equal(*both("create_normal_map", offset, extra))


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_4bit_types(name):
    assert torch.equal(*both("get_4bit_type", name, "cpu"))


def test_int4_works_here_only():
    with pytest.raises(RuntimeError):
        Peer.get_4bit_type("int4", "cpu")
    assert F.get_4bit_type("int4", "cpu").numel() == 16
