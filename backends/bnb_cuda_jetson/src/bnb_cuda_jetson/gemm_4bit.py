"""Kernels of 4-bit matrix products."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.backends import Call
from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import _native, panels
from bnb_cuda_jetson.calls import DTYPES, address, current_stream, kernel, nested_addresses

#: The native module chooses the kernel; its `gemm_4bit_paths` names what else may stand here.
_PATH = "automatic"
#: Rows of x from which a product may need scratch memory; for fewer, asking would cost more than the answer.
_SCRATCH_FROM = 17


def _panel_size(x: torch.Tensor, packed: torch.Tensor, blocksize: int, N: int, K: int, transposed: bool) -> int:
    """Return the size of panels, or 0 to multiply by the codes themselves."""
    if x.dtype != torch.bfloat16 or packed.data_ptr() % 4:
        return 0
    return panels.panel_size(x.get_device(), x.numel() // (N if transposed else K), N, K, blocksize, transposed)


def _scratch(call: Call) -> int:
    M = call.x.numel() // call.K
    if M < _SCRATCH_FROM:
        return 0
    size = _panel_size(call.x, call.packed, call.blocksize, call.N, call.K, transposed=False)
    if size:
        return 2 * size * int(call.K)
    product = call.x.get_device(), DTYPES[call.x.dtype], M, call.N, call.K, call.blocksize, call.nested is not None
    sums: int = _native.gemm_4bit_scratch(*product, _PATH)
    return sums


def _scratch_transposed(call: Call) -> int:
    return 2 * int(call.N) * _panel_size(call.g, call.packed, call.blocksize, call.N, call.K, transposed=True)


@kernel("gemm_4bit", scratch=_scratch)
def gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor],
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with x W^T + bias."""
    M = x.numel() // K
    size = _panel_size(x, packed, blocksize, N, K, transposed=False) if M >= panels.FEWEST_ROWS else 0
    if size:
        panels.multiply(x, packed, absmax, codebook, blocksize, N, K, bias, nested, False, size, out, scratch)
        return
    device = x.get_device()
    _native.gemm_4bit(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[x.dtype],
        x.data_ptr(),
        M,
        packed.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        blocksize,
        N,
        K,
        address(bias),
        *nested_addresses(nested),
        scratch.data_ptr(),
        _PATH,
    )


@kernel("gemm_4bit_transposed", scratch=_scratch_transposed)
def gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Fill `out` with g W."""
    size = _panel_size(g, packed, blocksize, N, K, transposed=True)
    if size:
        panels.multiply(g, packed, absmax, codebook, blocksize, N, K, None, nested, True, size, out, scratch)
        return
    device = g.get_device()
    _native.gemm_4bit_transposed(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[g.dtype],
        g.data_ptr(),
        g.numel() // N,
        packed.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        blocksize,
        N,
        K,
        *nested_addresses(nested),
    )


@kernel("grouped_gemm_4bit")
def grouped_gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with each token's product with its expert's weight."""
    _grouped(x, packed, absmax, codebook, blocksize, offsets, N, K, nested, out, transposed=False)


@kernel("grouped_gemm_4bit_transposed")
def grouped_gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` with the product of each token's gradient and its expert's weight."""
    _grouped(g, packed, absmax, codebook, blocksize, offsets, N, K, nested, out, transposed=True)


def _grouped(
    tokens: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    out: torch.Tensor,
    transposed: bool,
) -> None:
    device = tokens.get_device()
    _native.grouped_gemm_4bit(
        device,
        current_stream(device),
        out.data_ptr(),
        DTYPES[tokens.dtype],
        tokens.data_ptr(),
        tokens.shape[0],
        packed.data_ptr(),
        absmax.data_ptr(),
        codebook.data_ptr(),
        blocksize,
        offsets.data_ptr(),
        offsets.numel() - 1,
        N,
        K,
        transposed,
        *nested_addresses(nested),
    )
