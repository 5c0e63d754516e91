"""The arithmetic, in numpy. Every function fills the tensor that it gets last."""

import numpy as np


def _array(tensor):
    """View a tensor as an array; gradients are the core's business."""
    return tensor.detach().numpy()


# An overflow in a cast is an infinity, as it must be; it is nothing to warn of.
@np.errstate(all="ignore")
def dequantize_4bit(packed, absmax, codebook, blocksize, nested, out):
    """Look up two codes a byte, the first in the high nibble, and multiply by the scale of the block."""
    n = out.numel()
    packed = _array(packed).reshape(-1)
    codes = np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)[:n]
    scales = np.repeat(_block_scales(absmax, nested), blocksize)[:n]
    _array(out).reshape(-1)[:] = _array(codebook)[codes] * scales


def _block_scales(absmax, nested):
    scales = _array(absmax).reshape(-1)
    if nested is None:
        return scales
    nested_scales = np.repeat(_array(nested.absmax), nested.blocksize)[: scales.size]
    return _array(nested.codebook)[scales] * nested_scales + _array(nested.offset)


@np.errstate(all="ignore")
def matmul(x, weight, bias, out):
    """Multiply x [M, K] by weight [N, K] transposed in float32, and round once."""
    y = _array(x).astype(np.float32) @ _array(weight).T
    if bias is not None:
        y += _array(bias)
    _array(out)[:] = y
