"""4-bit ops: shapes, checks, derivatives and signatures of quantization, matrix products and embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional, Sequence, Tuple

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops import checks
from bnb_core.ops.indices import check_index_values, require_indices
from bnb_core.ops.outputs import Output
from bnb_core.ops.spec import Nested
from bnb_core.ops.structured import StructuredOp


def _quantize_meta(x: torch.Tensor, codebook: torch.Tensor, blocksize: int) -> Sequence[Output]:
    op = "quantize_4bit"
    checks.require_float(op, "x", x)
    checks.require_codebook(op, codebook, 16)
    checks.require_blocksize_4bit(op, blocksize)
    n = x.numel()
    return (((n + 1) // 2,), torch.uint8), ((checks.ceil_div(n, blocksize),), torch.float32)


def _check_packed(
    op: str, packed: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, n: Any, nested: Optional[Nested]
) -> None:
    checks.require_dtype(op, "packed", packed, torch.uint8)
    checks.require_codebook(op, codebook, 16)
    checks.require_blocksize_4bit(op, blocksize)
    checks.require_numel(op, "packed", packed, (n + 1) // 2, "one byte for two elements")
    checks.require_block_scales_4bit(op, absmax, checks.ceil_div(n, blocksize), nested)


def _dequantize_meta(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested: Optional[Nested],
) -> Sequence[Output]:
    checks.require_sizes("dequantize_4bit", **{f"shape[{dim}]": size for dim, size in enumerate(shape)})
    n: Any = 1
    for size in shape:
        n = n * size
    _check_packed("dequantize_4bit", packed, absmax, codebook, blocksize, n, nested)
    checks.require_float_dtype("dequantize_4bit", dtype)
    return ((shape, dtype),)


def _gemm_meta(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor],
    nested: Optional[Nested],
) -> Sequence[Output]:
    op = "gemm_4bit"
    checks.require_sizes(op, N=N, K=K)
    _check_packed(op, packed, absmax, codebook, blocksize, N * K, nested)
    checks.require_features(op, "x", x, K)
    checks.require_bias(op, bias, N, x.dtype)
    return (((*x.shape[:-1], N), x.dtype),)


def _gemm_transposed_meta(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    nested: Optional[Nested],
) -> Sequence[Output]:
    op = "gemm_4bit_transposed"
    checks.require_sizes(op, N=N, K=K)
    _check_packed(op, packed, absmax, codebook, blocksize, N * K, nested)
    checks.require_features(op, "g", g, N)
    return (((*g.shape[:-1], K), g.dtype),)


def _check_experts(
    op: str,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
) -> None:
    checks.require_sizes(op, N=N, K=K)
    checks.require_matrix(op, "packed", packed)
    experts = packed.shape[0]
    checks.require_dtype(op, "packed", packed, torch.uint8)
    checks.require_shape(op, "packed", packed, experts, (N * K + 1) // 2)
    checks.require_codebook(op, codebook, 16)
    checks.require_blocksize_4bit(op, blocksize)
    blocks = checks.ceil_div(N * K, blocksize)
    checks.require_block_scales_4bit(op, absmax, experts * blocks, nested)
    checks.require_shape(op, "absmax", absmax, experts, blocks)
    checks.require_dtype(op, "offsets", offsets, torch.int32)
    checks.require_shape(op, "offsets", offsets, experts + 1)


def _grouped_meta(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
) -> Sequence[Output]:
    op = "grouped_gemm_4bit"
    _check_experts(op, packed, absmax, codebook, blocksize, offsets, N, K, nested)
    checks.require_matrix(op, "x", x)
    checks.require_features(op, "x", x, K)
    return (((x.shape[0], N), x.dtype),)


def _grouped_transposed_meta(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
) -> Sequence[Output]:
    op = "grouped_gemm_4bit_transposed"
    _check_experts(op, packed, absmax, codebook, blocksize, offsets, N, K, nested)
    checks.require_matrix(op, "g", g)
    checks.require_features(op, "g", g, N)
    return (((g.shape[0], K), g.dtype),)


def _check_offsets(
    op: str, x: torch.Tensor, packed: Any, absmax: Any, codebook: Any, blocksize: Any, offsets: torch.Tensor, *rest: Any
) -> None:
    values, tokens = offsets.tolist(), x.shape[0]
    if values[0] == 0 and values[-1] == tokens and sorted(values) == values:
        return
    falling = next((i for i in range(1, len(values)) if values[i] < values[i - 1]), len(values) - 1)
    wrong = falling if values[0] == 0 else 0
    raise InvalidArgumentError(
        f"{op}: offsets[{wrong}] is {values[wrong]}; offsets must rise from 0 to {tokens}, the number of tokens, which are sorted "
        "by expert"
    )


def _embedding_meta(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    nested: Optional[Nested],
) -> Sequence[Output]:
    op = "embedding_4bit"
    require_indices(op, indices)
    checks.require_sizes(op, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
    _check_packed(op, packed, absmax, codebook, blocksize, num_embeddings * embedding_dim, nested)
    checks.require_float_dtype(op, dtype)
    return (((*indices.shape, embedding_dim), dtype),)


def _check_embedding_values(
    indices: torch.Tensor, packed: Any, absmax: Any, codebook: Any, blocksize: Any, num_embeddings: int, *rest: Any
) -> None:
    check_index_values("embedding_4bit", indices, num_embeddings)


_quantize = StructuredOp("quantize_4bit", _quantize_meta)
_dequantize = StructuredOp("dequantize_4bit", _dequantize_meta)
_gemm = StructuredOp("gemm_4bit", _gemm_meta, adjoint="gemm_4bit_transposed", rowwise=True)
_gemm_transposed = StructuredOp("gemm_4bit_transposed", _gemm_transposed_meta, adjoint="gemm_4bit", rowwise=True)
_grouped = StructuredOp(
    "grouped_gemm_4bit",
    _grouped_meta,
    adjoint="grouped_gemm_4bit_transposed",
    check_values=partial(_check_offsets, "grouped_gemm_4bit"),
)
_grouped_transposed = StructuredOp(
    "grouped_gemm_4bit_transposed",
    _grouped_transposed_meta,
    adjoint="grouped_gemm_4bit",
    check_values=partial(_check_offsets, "grouped_gemm_4bit_transposed"),
)
_embedding = StructuredOp("embedding_4bit", _embedding_meta, rowwise=True, check_values=_check_embedding_values)


def quantize_4bit(
    x: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    *,
    out: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Quantize to packed 4-bit codes with one scale a block (arXiv 2305.14314).

    Args:
        x: float32, float16 or bfloat16, any shape.
        codebook: float32 [16].
        blocksize: consecutive elements that share a scale: a power of two from 32 to 4096.
        out: tensors to fill instead of new ones.

    Returns:
        packed, uint8 [(n + 1) // 2], the first element of each pair in the high nibble, and absmax, float32 [ceil(n / blocksize)].

    Raises:
        InvalidArgumentError: a dtype, shape, device or blocksize that is not accepted.
    """
    return _quantize.call((x, codebook, blocksize), out)


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested: Optional[Nested] = None,
    *,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Dequantize packed 4-bit codes.

    Args:
        packed: uint8 [(n + 1) // 2].
        absmax: float32 [ceil(n / blocksize)]; uint8 if `nested` is given.
        codebook: float32 [16].
        blocksize: the one that `packed` was made with.
        shape: shape of the result, n elements.
        dtype: float32, float16 or bfloat16.
        nested: quantized block scales.
        out: tensor to fill instead of a new one.

    Returns:
        Values of `dtype` and `shape`.

    Raises:
        InvalidArgumentError: a dtype, shape, device or blocksize that is not accepted.
    """
    return _dequantize.call((packed, absmax, codebook, blocksize, shape, dtype, nested), out)


def gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor] = None,
    nested: Optional[Nested] = None,
    *,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Multiply by a 4-bit weight: x W^T + bias. Differentiable in x and bias.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        packed: uint8 [(N*K + 1) // 2], the weight [N, K] in row-major order; blocks may straddle rows.
        absmax: float32 [ceil(N*K / blocksize)]; uint8 if `nested` is given.
        codebook: float32 [16].
        blocksize: the one that `packed` was made with.
        N, K: rows and columns of the weight.
        bias: [N] in x's dtype.
        nested: quantized block scales.
        out: tensor to fill instead of a new one; not differentiable then.

    Returns:
        [..., N] in x's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape, device or blocksize that is not accepted.
    """
    return _gemm.call((x, packed, absmax, codebook, blocksize, N, K, bias, nested), out)


def gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    nested: Optional[Nested] = None,
    *,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Multiply by a 4-bit weight, transposed: g W. The gradient of `gemm_4bit` in x.

    Args:
        g: float32, float16 or bfloat16 [..., N].
        packed, absmax, codebook, blocksize, N, K, nested: as in `gemm_4bit`.
        out: tensor to fill instead of a new one; not differentiable then.

    Returns:
        [..., K] in g's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape, device or blocksize that is not accepted.
    """
    return _gemm_transposed.call((g, packed, absmax, codebook, blocksize, N, K, nested), out)


def grouped_gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested] = None,
) -> torch.Tensor:
    """Multiply each token by its expert's 4-bit weight. Differentiable in x.

    Args:
        x: float32, float16 or bfloat16 [tokens, K], sorted by expert.
        packed: uint8 [experts, (N*K + 1) // 2].
        absmax: float32 [experts, ceil(N*K / blocksize)]; uint8 if `nested` is given.
        codebook: float32 [16].
        blocksize: the one that `packed` was made with; no block spans two experts.
        offsets: int32 [experts + 1]; tokens offsets[e] to offsets[e+1] belong to expert e.
        N, K: rows and columns of each expert's weight.
        nested: quantized block scales, over all experts' blocks in order.

    Returns:
        [tokens, N] in x's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape, device, blocksize or offset that is not accepted.
    """
    return _grouped.call((x, packed, absmax, codebook, blocksize, offsets, N, K, nested))


def grouped_gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested] = None,
) -> torch.Tensor:
    """Multiply each token's gradient by its expert's weight. The gradient of `grouped_gemm_4bit` in x.

    Args:
        g: float32, float16 or bfloat16 [tokens, N], sorted by expert.
        packed, absmax, codebook, blocksize, offsets, N, K, nested: as in `grouped_gemm_4bit`.

    Returns:
        [tokens, K] in g's dtype.

    Raises:
        InvalidArgumentError: a dtype, shape, device, blocksize or offset that is not accepted.
    """
    return _grouped_transposed.call((g, packed, absmax, codebook, blocksize, offsets, N, K, nested))


def embedding_4bit(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    nested: Optional[Nested] = None,
) -> torch.Tensor:
    """Dequantize the rows of a 4-bit table that `indices` name.

    Args:
        indices: int32 or int64, any shape, each in [0, num_embeddings); checked on the CPU, where reading them is free.
        packed: uint8 [(num_embeddings * embedding_dim + 1) // 2].
        absmax: float32 [blocks]; uint8 if `nested` is given.
        codebook: float32 [16].
        blocksize: the one that `packed` was made with; blocks may straddle rows.
        num_embeddings, embedding_dim: shape of the table.
        dtype: float32, float16 or bfloat16.
        nested: quantized block scales.

    Returns:
        [..., embedding_dim] of `dtype`.

    Raises:
        InvalidArgumentError: a dtype, shape, device, blocksize or index that is not accepted.
    """
    return _embedding.call((indices, packed, absmax, codebook, blocksize, num_embeddings, embedding_dim, dtype, nested))
