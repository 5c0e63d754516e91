"""Kernels of 4-bit matrix products."""

from __future__ import annotations

from typing import Optional

import torch

from bnb_core.backends import Call
from bnb_core.ops.spec import Nested
from bnb_cuda_jetson import _native, panels, paths
from bnb_cuda_jetson.calls import DTYPES, NOT_NESTED, current_stream, kernel, nested_addresses
from bnb_cuda_jetson.choice import Choice, choose, choose_transposed


def _scratch(call: Call) -> int:
    x = call.x
    M = x.numel() // x.size(-1)  # which is K, but faster to have than call.K
    if M < paths.FEWEST_MANY:  # to ask would cost more than the answer
        return 0
    nested = call.nested
    nested_blocksize, alignment = 0 if nested is None else nested.blocksize, (x.data_ptr() | call.packed.data_ptr()) % 16
    return choose(x.get_device(), DTYPES[x.dtype], M, call.N, call.K, call.blocksize, nested_blocksize, alignment).scratch


def _scratch_transposed(call: Call) -> int:
    return _choice_transposed(call.g, call.packed, call.blocksize, call.N, call.K).scratch


def _choice_transposed(g: torch.Tensor, packed: torch.Tensor, blocksize: int, N: int, K: int) -> Choice:
    return choose_transposed(g.get_device(), DTYPES[g.dtype], g.numel() // N, N, K, blocksize, packed.data_ptr() % 16)


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
    device, dtype, M, rows, codes = x.get_device(), DTYPES[x.dtype], x.numel() // K, x.data_ptr(), packed.data_ptr()
    path, lines, _ = choose(device, dtype, M, N, K, blocksize, 0 if nested is None else nested.blocksize, (rows | codes) % 16)
    if lines:
        panels.multiply(x, packed, absmax, codebook, blocksize, N, K, bias, nested, False, lines, out, scratch)
        return
    _native.gemm_4bit(
        device,
        current_stream(device),
        out.data_ptr(),
        dtype,
        rows,
        M,
        codes,
        absmax.data_ptr(),
        codebook.data_ptr(),
        blocksize,
        N,
        K,
        0 if bias is None else bias.data_ptr(),
        *(NOT_NESTED if nested is None else nested_addresses(nested)),
        scratch.data_ptr(),
        path,
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
    choice = _choice_transposed(g, packed, blocksize, N, K)
    if choice.lines:
        panels.multiply(g, packed, absmax, codebook, blocksize, N, K, None, nested, True, choice.lines, out, scratch)
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
