"""What comparisons with bitsandbytes hold both sides against: the contract in numpy, and bitsandbytes' own ways to leave it."""

import numpy as np
import pytest
import torch


class Contract:
    """Quantization by blocks as docs/numerics.md defines it, one plain step after the other."""

    @staticmethod
    def quantize(x, codebook, blocksize, divided_tail=False):
        """Return codes and absmax; with `divided_tail` as bitsandbytes does in the last block, if that is short."""
        x = x.reshape(-1).float().numpy()
        codebook = codebook.numpy()
        ranked = np.argsort(codebook, kind="stable")
        values = codebook[ranked]
        midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
        zero = ranked[np.searchsorted(midpoints, np.float32(0))]
        codes = np.empty(x.size, np.uint8)
        absmax = np.empty(-(-x.size // blocksize), np.float32)
        for i in range(absmax.size):
            block = x[i * blocksize : (i + 1) * blocksize]
            absmax[i] = np.abs(block).max()
            scale = np.float32(1) / np.maximum(absmax[i], np.float32(2.0**-126))
            with np.errstate(invalid="ignore"):
                scaled = block / absmax[i] if divided_tail and block.size < blocksize else block * scale
            ranks = np.searchsorted(midpoints, scaled)
            codes[i * blocksize : (i + 1) * blocksize] = np.where(
                np.isnan(scaled), zero, ranked[np.minimum(ranks, len(ranked) - 1)]
            )
        return torch.from_numpy(codes), torch.from_numpy(absmax)

    @staticmethod
    def dequantize(codes, codebook, absmax, blocksize, dtype):
        """Return one float32 product an element, rounded into `dtype`."""
        scales = np.repeat(absmax.numpy(), blocksize)[: codes.numel()]
        return torch.from_numpy(codebook.numpy()[codes.reshape(-1).numpy()] * scales).to(dtype)


@pytest.fixture
def contract():
    return Contract


@pytest.fixture
def unpack():
    """Codes of packed bytes, the first element of each pair from the high nibble."""

    def unpack(packed, n):
        data = packed.reshape(-1)
        return torch.stack([data >> 4, data & 15], 1).view(-1)[:n]

    return unpack


@pytest.fixture(autouse=True)
def _peer_runs_eagerly(monkeypatch):
    """Keep bitsandbytes from compiling two of its helpers for every shape; what they compute stays the same."""
    default = pytest.importorskip("bitsandbytes.backends.default.ops")
    for name in ("_dequantize_4bit_compute", "_dequantize_blockwise_compute"):
        monkeypatch.setattr(default, name, getattr(default, name).__wrapped__)


@pytest.fixture
def peer_default():
    """Call bitsandbytes' implementation for any device, where the CPU has another that is not exact."""

    def call(name, *args):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
        return getattr(torch.ops.bitsandbytes, name).default.redispatch(keys, *args)

    return call


@pytest.fixture
def peer_dequantize_4bit(peer_default):
    """Dequantize with bitsandbytes: on its CPU path where that is right, and otherwise on the one for any device."""
    from bitsandbytes import functional as peer

    def call(packed, state):
        if state.shape[-1] % 2 or state.shape[-1] % state.blocksize == 0:
            return peer.dequantize_4bit(packed, state)
        scales = peer.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        return peer_default("dequantize_4bit", packed, scales, state.blocksize, state.quant_type, state.shape, state.dtype)

    return call
