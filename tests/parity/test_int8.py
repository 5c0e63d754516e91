"""LLM.int8() gives bitsandbytes' codes and scales, and its products up to rounding."""

import numpy as np
import pytest
import torch

import bnb_core as bnb
from bnb_core import functional as F

bitsandbytes = pytest.importorskip("bitsandbytes")
Peer = bitsandbytes.functional


@pytest.mark.parametrize("threshold", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 64), (33, 130)], ids=str)
def test_rows(threshold, shape):
    x = torch.randn(shape).half()
    codes, absmax, outliers = F.int8_vectorwise_quant(x, threshold)
    peer_codes, peer_absmax, peer_outliers = Peer.int8_vectorwise_quant(x.clone(), threshold)
    assert torch.equal(absmax, peer_absmax)
    if threshold:
        assert outliers.dtype == peer_outliers.dtype
        assert torch.equal(outliers, peer_outliers)
    else:
        assert outliers is None
        assert peer_outliers is None
    exact = x.double() * (127 / absmax.double())[:, None]
    if threshold:
        exact[:, outliers] = 0
    clear = (exact - exact.floor() - 0.5).abs() > 1e-4  # not a tie up to rounding
    assert torch.equal(codes[clear], peer_codes[clear])
    assert (codes.int() - peer_codes.int()).abs().max() <= 1
    assert clear.double().mean() > 0.99


def test_dequantize_rows():
    codes = torch.randint(-127, 128, (50, 70), dtype=torch.int8)
    absmax = torch.rand(50)
    y, peer = F.int8_vectorwise_dequant(codes, absmax), Peer.int8_vectorwise_dequant(codes, absmax)
    exact = codes.double() * absmax.double()[:, None] / 127
    for result in (y, peer):  # two roundings and a rounded constant, in another order
        assert ((result.double() - exact).abs() <= 2.0**-22 * exact.abs()).all()


@pytest.mark.parametrize("bias", [False, True])
def test_dequantized_products(bias):
    product = torch.randint(-(2**20), 2**20, (9, 13), dtype=torch.int32)
    rows, cols = torch.rand(9), torch.rand(13)
    bias = torch.randn(13).half() if bias else None
    y, peer = F.int8_mm_dequant(product, rows, cols, bias=bias), Peer.int8_mm_dequant(product, rows, cols, bias=bias)
    assert y.dtype == peer.dtype == torch.float16
    torch.testing.assert_close(y, peer, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_matmul(threshold):
    """Against bitsandbytes' LLM.int8() path, in inference; float16, which it casts everything to."""
    weight, x = torch.randn(48, 130).half(), torch.randn(17, 130).half()
    ours, theirs = bnb.MatmulLtState(), bitsandbytes.MatmulLtState()
    theirs.is_training = False
    y = bnb.matmul(x, weight, state=ours, threshold=threshold)
    peer = bitsandbytes.matmul(x, weight, state=theirs, threshold=threshold)
    assert torch.equal(ours.SCB, theirs.SCB)
    assert (ours.CB.int() - theirs.CB.int()).abs().max() <= 1
    if threshold:
        assert torch.equal(ours.idx, theirs.idx)
    torch.testing.assert_close(y, peer, rtol=1e-2, atol=2e-2)


# ----------------------------------------------------------------------------------------------------- where bitsandbytes deviates


def test_deviation_scales_are_divided_once():
    """127 / absmax is one division here; torch's `number / tensor`, which bitsandbytes has there, rounds twice."""
    absmax = torch.rand(20000) + 0.5
    once = torch.from_numpy(np.float32(127) / absmax.numpy())
    ties = (torch.arange(20000) % 126 + 0.5) / once
    x = torch.stack([absmax, ties], 1)
    codes, peer_codes = F.int8_vectorwise_quant(x)[0], Peer.int8_vectorwise_quant(x.clone())[0]
    assert torch.equal(codes, (x * once[:, None]).round().to(torch.int8))
    assert torch.equal(peer_codes, (x * (127 / absmax)[:, None]).round().to(torch.int8))
    assert not torch.equal(codes, peer_codes)


def test_deviation_constant_of_dequantized_products():
    """1 / 127^2 is 6.200012e-5; bitsandbytes' code for any device has 6.200124e-5."""
    product = torch.full((1, 1), 127**2 * 1000, dtype=torch.int32)
    one = torch.ones(1)
    peer = torch.ops.bitsandbytes.int8_mm_dequant.default(product, one, one, dtype=torch.float32)
    y = F.int8_mm_dequant(product, one, one, out=torch.empty(1, 1))
    assert abs(float(y) / 1000 - 1) < 1e-6
    assert 1.5e-5 < float(peer) / 1000 - 1 < 2.1e-5


def test_deviation_integer_products_in_float32(peer_default):
    """bitsandbytes' code for any device, which ARM runs, multiplies in float32: exact only up to 2^24."""
    a = torch.full((2, 4096), 127, dtype=torch.int8)
    b = a.clone()
    b[:, 0] = 126
    exact = (a.long() @ b.long().t()).int()
    assert torch.equal(F.int8_linear_matmul(a, b), exact)
    assert not torch.equal(peer_default("int8_linear_matmul", a, b), exact)


def test_deviation_other_dtypes_are_not_cast_to_float16():
    weight, x = torch.randn(8, 64), torch.randn(3, 64)
    x[0, 0] = 1e5  # more than float16 has
    assert bnb.matmul(x, weight).isfinite().all()
    state = bitsandbytes.MatmulLtState()
    state.is_training = False
    assert not bitsandbytes.matmul(x, weight, state=state).isfinite().all()


def test_deviation_trained_weights_are_never_stale():
    """In evaluation bitsandbytes keeps the codes of the last training step, though an optimizer may have changed the weight."""
    weight, x = torch.ones(4, 8), torch.ones(1, 8)
    results = []
    for library in (bnb, bitsandbytes):
        state = library.MatmulLtState()
        library.matmul(x, weight, state=state)
        state.is_training = False
        results.append(float(library.matmul(x, weight * 2, state=state)[0, 0]))
    assert results[0] == pytest.approx(16, rel=1e-3)
    assert results[1] == pytest.approx(8, rel=1e-3)


def test_deviation_inputs_with_more_dimensions():
    x, weight = torch.randn(2, 3, 4, 64).half(), torch.randn(8, 64).half()
    state = bitsandbytes.MatmulLtState()
    state.is_training = False
    with pytest.raises((RuntimeError, IndexError)):
        bitsandbytes.matmul(x, weight, state=state)
    assert bnb.matmul(x, weight).shape == (2, 3, 4, 8)


def test_deviation_double_quant_on_cpus():
    x = torch.randn(4, 8).half()
    with pytest.raises(NotImplementedError):
        Peer.int8_double_quant(x)
    assert len(F.int8_double_quant(x)) == 5
