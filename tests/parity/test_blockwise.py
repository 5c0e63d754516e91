"""8-bit blockwise quantization gives the bytes of bitsandbytes' exact implementation, which is not the one that its CPUs run."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from bnb_core import functional as F

bitsandbytes = pytest.importorskip("bitsandbytes")
Peer = bitsandbytes.functional

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
codebooks = pytest.mark.parametrize(
    "code",
    [F.create_dynamic_map(), F.create_dynamic_map(signed=False), F.create_linear_map(), F.create_fp8_map()],
    ids=["dynamic", "udynamic", "linear", "fp8"],
)


@dtypes
@codebooks
@pytest.mark.parametrize("blocksize", [1, 64, 100, 256, 4096])
def test_codes_and_scales(dtype, code, blocksize, contract, peer_default):
    for n in (1, 3 * blocksize, 2 * blocksize + blocksize // 2 + 1):
        x = (torch.randn(n) * torch.randn(n).exp()).to(dtype)
        codes, state = F.quantize_blockwise(x, code=code, blocksize=blocksize)
        peer_codes, peer_absmax = peer_default("quantize_blockwise", x, code, blocksize)
        assert torch.equal(state.absmax, peer_absmax)
        # A code map with equal entries has several codes for one value; bitsandbytes' search takes the first of them, as here.
        assert torch.equal(codes, contract.quantize(x, code, blocksize)[0])
        assert torch.equal(peer_codes, contract.quantize(x, code, blocksize, divided_tail=True)[0])
        whole = n // blocksize * blocksize
        assert torch.equal(codes[:whole], peer_codes[:whole])


@dtypes
@codebooks
@pytest.mark.parametrize("blocksize", [64, 100, 4096])
def test_dequantize(dtype, code, blocksize):
    codes = torch.randint(256, (7, 333), dtype=torch.uint8)
    peer_state = Peer.QuantState(torch.rand(-(-2331 // blocksize)), code=code, blocksize=blocksize, dtype=dtype)
    state = F.QuantState(peer_state.absmax, code=code, blocksize=blocksize, dtype=dtype)
    expected = Peer.dequantize_blockwise(codes, peer_state)
    y = F.dequantize_blockwise(codes, state)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert torch.equal(
        F.dequantize_blockwise(codes, absmax=state.absmax, code=code, blocksize=blocksize),
        Peer.dequantize_blockwise(codes, absmax=state.absmax, code=code, blocksize=blocksize),
    )


@dtypes
def test_nested(dtype):
    codes, peer_state = Peer.quantize_blockwise(torch.randn(5000).to(dtype), blocksize=64, nested=True)
    state = F.QuantState.from_dict(peer_state.as_dict(), "cpu")
    assert state.state2.blocksize == 64
    assert torch.equal(F.dequantize_blockwise(codes, state), Peer.dequantize_blockwise(codes, peer_state))


# ----------------------------------------------------------------------------------------------------- where bitsandbytes deviates


def wrong_codes(codes, x, code, absmax, blocksize):
    """Count the codes of which another is nearer, in float64, by more than the rounding of float32."""
    scaled = (x.double().view(-1, blocksize) / absmax.double()[:, None]).view(-1)
    values = code.double()
    right = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2)
    nearest = (scaled - values[right]).abs()
    return ((scaled - values[codes.long()]).abs() > nearest * (1 + 1e-6) + 1e-9).sum()


def test_deviation_lookup_table_of_cpus():
    """bitsandbytes' CPU kernel looks codes up by 16 bits of x / absmax: small values, 0 among them, get the code of another."""
    x = torch.cat([torch.ones(1), torch.zeros(255)])
    codes, state = F.quantize_blockwise(x, blocksize=256)
    peer_codes, peer_state = Peer.quantize_blockwise(x, blocksize=256)
    assert torch.equal(F.dequantize_blockwise(codes, state), x)
    assert (Peer.dequantize_blockwise(peer_codes, peer_state)[1:] > 2e-5).all(), "0 comes back as 2e-5"

    x, unsigned = torch.randn(256 * 256).mul(3).exp(), F.create_dynamic_map(signed=False)
    codes, state = F.quantize_blockwise(x, code=unsigned, blocksize=256)
    peer_codes, peer_state = Peer.quantize_blockwise(x, code=unsigned, blocksize=256)
    assert torch.equal(state.absmax, peer_state.absmax)
    assert wrong_codes(codes, x, unsigned, state.absmax, 256) == 0
    assert wrong_codes(peer_codes, x, unsigned, state.absmax, 256) > 0.2 * x.numel()


def test_deviation_nested_scales_on_cpus(peer_default):
    """Which is also how bitsandbytes quantizes the scales of 4-bit weights there."""
    x = torch.randn(1024, 256)
    scales = Peer.quantize_nf4(x)[1].absmax
    _, nested = Peer.quantize_nf4(x, compress_statistics=True)
    exact, absmax = peer_default("quantize_blockwise", scales - nested.offset, F.create_dynamic_map(), 256)
    ours, state = F.quantize_blockwise(scales - nested.offset, blocksize=256)
    assert torch.equal(ours, exact)
    assert torch.equal(state.absmax, absmax)
    assert torch.equal(nested.state2.absmax, absmax)
    assert (nested.absmax != exact).any()


def test_deviation_zero_blocks():
    """A block of zeros: here the code of 0; there code 0, which stands for -0.99 times a scale that is 0."""
    codes, state = F.quantize_blockwise(torch.zeros(256), blocksize=256)
    peer_codes, peer_state = Peer.quantize_blockwise(torch.zeros(256), blocksize=256)
    assert (codes == 127).all()
    assert (peer_codes == 0).all()
    assert torch.equal(F.dequantize_blockwise(codes, state), Peer.dequantize_blockwise(peer_codes, peer_state))


def test_deviation_codes_under_nan(peer_default):
    x = torch.randn(256)
    x[7] = float("nan")
    codes, state = F.quantize_blockwise(x, blocksize=256)
    peer_codes, peer_absmax = peer_default("quantize_blockwise", x, F.create_dynamic_map(), 256)
    assert state.absmax.isnan().all()
    assert peer_absmax.isnan().all()
    assert (codes == 127).all()
    assert (peer_codes == 255).all()


def test_deviation_outputs_are_filled_on_cpus_too():
    codes, peer_state = Peer.quantize_blockwise(torch.randn(100))
    state = F.QuantState.from_dict(peer_state.as_dict(), "cpu")
    out = torch.empty(100)
    with pytest.raises(NotImplementedError):
        Peer.dequantize_blockwise(codes, peer_state, out=out)
    assert torch.equal(F.dequantize_blockwise(codes, state, out=out), Peer.dequantize_blockwise(codes, peer_state))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only there can the CPU's features be masked")
def test_deviation_codebooks_depend_on_the_cpu():
    """bitsandbytes builds its tables with torch.linspace, which rounds differently without a fused multiply-add."""
    script = (
        "import hashlib, bitsandbytes.functional as P, bnb_core.functional as F\n"
        "for f in (F, P): print(hashlib.sha256(f.create_dynamic_map().numpy().tobytes()).hexdigest()[:16])"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    ours, peers = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True, text=True
    ).stdout.split()
    assert ours == "e732639a65f497b4", "as everywhere"
    assert peers != ours
