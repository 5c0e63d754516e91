"""4-bit quantization and dequantization give bitsandbytes' bytes, but for the deviations listed in docs/numerics.md."""

import pytest
import torch

import bnb_core as bnb
from bnb_core import functional as F
from bnb_core import ops
from bnb_core.ops.spec import BLOCKSIZES_4BIT

bitsandbytes = pytest.importorskip("bitsandbytes")
Peer = bitsandbytes.functional

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
blocksizes = pytest.mark.parametrize("blocksize", BLOCKSIZES_4BIT)


def sizes(blocksize):
    """One element, an odd part of a block, whole blocks, and blocks with an odd rest."""
    return (1, blocksize - 1, 3 * blocksize, 2 * blocksize + 17)


@dtypes
@quant_types
@blocksizes
def test_codes_and_scales(dtype, quant_type, blocksize, contract, unpack):
    code = Peer.get_4bit_type(quant_type, "cpu")
    for n in sizes(blocksize):
        x = (torch.randn(n) * torch.randn(n).exp()).to(dtype)
        packed, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        peer_packed, peer_state = Peer.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
        assert torch.equal(state.absmax, peer_state.absmax)
        whole = n // blocksize * blocksize // 2
        assert torch.equal(packed[:whole], peer_packed[:whole])
        # In a short last block bitsandbytes divides by absmax, which rounds differently now and then. Both do what they say.
        assert torch.equal(unpack(packed, n), contract.quantize(x, code, blocksize)[0])
        assert torch.equal(unpack(peer_packed, n), contract.quantize(x, code, blocksize, divided_tail=True)[0])
        assert packed.shape == peer_packed.shape
        assert n % 2 == 0 or packed[-1] & 15 == peer_packed[-1] & 15, "the nibble that is left over"
        assert (state.shape, state.dtype, state.quant_type) == (peer_state.shape, peer_state.dtype, peer_state.quant_type)


@dtypes
@quant_types
def test_midpoints_and_their_neighbours(dtype, quant_type, unpack):
    """Where a tie or the last bit decides, in a block whose scale is 1."""
    values = Peer.get_4bit_type(quant_type, "cpu").sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    infinity = torch.tensor(float("inf"))
    near = torch.cat([midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity), values]).to(dtype)
    x = torch.zeros(64, dtype=dtype)
    x[0], x[1 : 1 + near.numel()] = 1.0, near
    packed, _ = F.quantize_4bit(x, quant_type=quant_type)
    assert torch.equal(packed, Peer.quantize_4bit(x, quant_type=quant_type)[0])


@dtypes
@quant_types
@pytest.mark.parametrize("shape", [(33,), (7, 9), (4, 128), (3, 5, 16), (64, 96)], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_dequantize(dtype, quant_type, shape, nested, blocksize, peer_dequantize_4bit):
    x = torch.randn(shape).to(dtype)
    packed, peer_state = Peer.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    state = bnb.QuantState.from_dict(peer_state.as_dict(packed=True), "cpu")
    expected = peer_dequantize_4bit(packed, peer_state)
    y = F.dequantize_4bit(packed, state)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


def test_a_row_of_codes_gives_the_transposed_result():
    packed, peer_state = Peer.quantize_nf4(torch.randn(9, 128))
    state = bnb.QuantState.from_dict(peer_state.as_dict(), "cpu")
    y = F.dequantize_4bit(packed.t(), state)
    assert y.shape == (128, 9)
    assert torch.equal(y, Peer.dequantize_4bit(packed.t(), peer_state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "storage",
    [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn],
    ids=str,
)
def test_storage(quant_type, storage):
    x = torch.randn(64, 64)
    stored, state = F.quantize_4bit(x, quant_type=quant_type, quant_storage=storage)
    peer_stored, peer_state = Peer.quantize_4bit(x, quant_type=quant_type, quant_storage=storage)
    assert stored.shape == peer_stored.shape
    assert stored.dtype == peer_stored.dtype
    assert torch.equal(stored.view(torch.uint8), peer_stored.view(torch.uint8))
    assert torch.equal(F.dequantize_4bit(peer_stored, state), Peer.dequantize_4bit(stored, peer_state))


@dtypes
@quant_types
def test_nested_scales_given_the_same_offset(dtype, quant_type, peer_default):
    x = torch.randn(300, 100).to(dtype)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    peer_packed, peer_state = Peer.quantize_4bit(x, quant_type=quant_type)
    assert torch.equal(packed[:14976], peer_packed[:14976])  # but for the short last block
    codes, absmax = peer_default("quantize_blockwise", peer_state.absmax - state.offset, Peer.create_dynamic_map(), 256)
    whole = codes.numel() // 256 * 256
    assert torch.equal(state.absmax[:whole], codes[:whole])
    assert torch.equal(state.state2.absmax, absmax)
    assert torch.equal(state.state2.code, Peer.create_dynamic_map())
    assert state.state2.blocksize == 256
    assert state.offset == peer_state.absmax.double().mean().float()


@dtypes
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_products(dtype, nested):
    """Both within the rounding of one product from float64, so within twice that of each other."""
    packed, peer_state = Peer.quantize_4bit(torch.randn(96, 130), quant_type="nf4", compress_statistics=nested)
    state = bnb.QuantState.from_dict(peer_state.as_dict(), "cpu")
    weight = F.dequantize_4bit(packed, state).double()
    x = torch.randn(7, 130).to(dtype)
    bias = torch.randn(96).to(dtype)
    exact = x.double() @ weight.t() + bias.double()
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    bound = unit * exact.abs() + (unit + 2.0**-24 * 130) * (x.double().abs() @ weight.abs().t())
    y = bnb.matmul_4bit(x, packed.t(), state, bias=bias)
    assert ((y.double() - exact).abs() <= bound).all()
    peer = bitsandbytes.matmul_4bit(x, packed.t(), peer_state, bias=bias)
    assert ((peer.double() - y.double()).abs() <= 2 * bound).all()


def test_transposed_weights_warn_alike():
    packed, peer_state = Peer.quantize_4bit(torch.randn(130, 128), quant_type="nf4")
    state = bnb.QuantState.from_dict(peer_state.as_dict(), "cpu")
    x = torch.randn(7, 130)
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        expected = bitsandbytes.matmul_4bit(x, packed, peer_state)
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        y = bnb.matmul_4bit(x, packed, state)
    torch.testing.assert_close(y, expected)


# ----------------------------------------------------------------------------------------------------- where bitsandbytes deviates


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="bitsandbytes has another loop for this CPU")
def test_deviation_blocks_that_straddle_rows(contract, unpack):
    """bitsandbytes' AVX-512 loop takes wrong scales for rows that are not whole blocks; its loop for any device does not."""
    packed, peer_state = Peer.quantize_nf4(torch.randn(64, 96))
    state = bnb.QuantState.from_dict(peer_state.as_dict(), "cpu")
    codes = unpack(packed, 64 * 96)
    expected = contract.dequantize(codes, state.code, state.absmax, 64, torch.float32).view(64, 96)
    assert torch.equal(F.dequantize_4bit(packed, state), expected)
    wrong = Peer.dequantize_4bit(packed, peer_state) != expected
    assert wrong.double().mean() > 0.25


def test_deviation_division_in_the_last_block(contract, unpack):
    """x / absmax and x * (1 / absmax) differ in the last bit; near a midpoint that is another code."""
    code = Peer.get_4bit_type("nf4", "cpu")
    absmax, midpoints = torch.rand(300) + 0.5, (code[:-1] + code[1:]) / 2
    x = torch.stack([absmax, absmax * midpoints[torch.arange(300) % 15]], 1)
    different = 0
    for pair in x:  # each a block of its own, and a short one
        ours, peers = (unpack(q.quantize_4bit(pair, quant_type="nf4")[0], 2) for q in (F, Peer))
        assert torch.equal(ours, contract.quantize(pair, code, 64)[0])
        assert torch.equal(peers, contract.quantize(pair, code, 64, divided_tail=True)[0])
        different += not torch.equal(ours, peers)
        # A block that is filled up with zeros is not short, and then both give our code.
        filled = torch.cat([pair, torch.zeros(62)])
        assert torch.equal(unpack(Peer.quantize_4bit(filled, quant_type="nf4")[0], 2), ours)
    assert different > 10


def test_deviation_scale_of_a_short_block_of_zeros():
    for zeros in (torch.zeros(64), torch.zeros(10)):
        _, state = F.quantize_4bit(zeros, quant_type="nf4")
        _, peer_state = Peer.quantize_4bit(zeros, quant_type="nf4")
        assert state.absmax == 0
        assert peer_state.absmax == (0 if zeros.numel() == 64 else torch.tensor(1e-38))


def test_deviation_floor_of_the_scale(contract, unpack):
    """Blocks below 2^-126: bitsandbytes stops at 1e-38, which is no longer a normal number."""
    code = Peer.get_4bit_type("nf4", "cpu")
    x = torch.linspace(-1.0, 1.0, 64) * 1.1e-38
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    peer_packed, peer_state = Peer.quantize_4bit(x, quant_type="nf4")
    assert torch.equal(state.absmax, peer_state.absmax)
    assert torch.equal(unpack(packed, 64), contract.quantize(x, code, 64)[0])
    assert not torch.equal(packed, peer_packed)
    normal = x * 2  # from 2^-126 on they agree
    assert torch.equal(F.quantize_4bit(normal, quant_type="nf4")[0], Peer.quantize_4bit(normal, quant_type="nf4")[0])


def test_deviation_last_bit_of_the_nested_offset():
    """bitsandbytes sums in float32, whose rounding depends on the order."""
    different = 0
    for blocks in range(1000, 1400, 10):
        x = torch.randn(blocks, 32).abs()
        _, plain = F.quantize_4bit(x, blocksize=32)
        _, state = F.quantize_4bit(x, blocksize=32, compress_statistics=True)
        _, peer_state = Peer.quantize_4bit(x, blocksize=32, compress_statistics=True)
        exact = sum(plain.absmax.double().tolist()) / blocks
        assert state.offset == torch.tensor(exact, dtype=torch.float32)
        assert (peer_state.offset.double() - exact).abs() <= 4 * 2.0**-24 * exact
        different += bool(state.offset != peer_state.offset)
    assert different > 0


def test_deviation_codes_under_nan(unpack):
    """A NaN makes the scale of its block NaN in both; here the codes are those of 0, there those of the largest value."""
    x = torch.randn(128)
    x[5] = float("nan")
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    peer_packed, peer_state = Peer.quantize_4bit(x, quant_type="nf4")
    assert state.absmax[0].isnan()
    assert peer_state.absmax[0].isnan()
    assert (unpack(packed, 64) == 7).all()
    assert (unpack(peer_packed, 64) == 15).all()
    assert torch.equal(packed[32:], peer_packed[32:])


def test_sign_of_the_zero_of_fp4(unpack):
    """FP4 has two codes for 0. On CPUs bitsandbytes ranks them as here (its CUDA kernels take the sign of x)."""
    x = torch.zeros(64)
    x[:3] = torch.tensor([1.0, 1e-4, -1e-4])
    packed, state = F.quantize_fp4(x)
    assert unpack(packed, 4).tolist() == [3, 8, 0, 0]
    assert torch.equal(packed, Peer.quantize_fp4(x)[0])
    assert torch.equal(F.dequantize_4bit(packed, state)[1:], torch.zeros(63))


def test_deviation_a_single_byte_is_taken_for_a_row():
    x = torch.tensor([[1.0, -1.0]])
    packed, state = F.quantize_nf4(x)
    assert torch.equal(F.dequantize_4bit(packed, state), x)
    assert torch.equal(Peer.dequantize_4bit(*Peer.quantize_nf4(x)), x.t())


def test_deviation_outputs_are_filled_on_cpus_too():
    packed, state = F.quantize_nf4(torch.randn(4, 64))
    _, peer_state = Peer.quantize_nf4(torch.randn(4, 64))
    out = torch.empty(4, 64)
    with pytest.raises(NotImplementedError):
        Peer.dequantize_4bit(packed, peer_state, out=out)
    assert torch.equal(F.dequantize_4bit(packed, state, out=out), F.dequantize_4bit(packed, state))


def test_nested_dequantization_rounds_twice():
    """The scales are a product and a sum, each rounded: what an op does in one pass, and what bitsandbytes does in two."""
    x = torch.randn(64, 64)
    _, state = F.quantize_4bit(x, compress_statistics=True)
    peer_state = Peer.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    expected = Peer.dequantize_blockwise(peer_state.absmax, peer_state.state2) + peer_state.offset
    n = state.nested_statistics
    ones = torch.full((2048,), 0x33, dtype=torch.uint8)  # the code of 1 in FP4
    y = ops.dequantize_4bit(ones, state.absmax, state.code, 64, (64, 64), torch.float32, n)
    assert torch.equal(y[:, 0], expected)
    assert torch.equal(F.dequantize_blockwise(state.absmax, state.state2) + state.offset, expected)
