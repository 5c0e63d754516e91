"""One plain call of every op, for tests that concern all of them: small, or large enough that kernels use several threads."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import torch

from bnb_core.ops.spec import OPTIMIZER_BLOCKSIZE, Hyperparameters
from bnb_core.testing import cases
from bnb_core.testing.oracle import quantize_blockwise
from bnb_core.testing.tolerances import as_numpy

Arguments = Tuple[Any, ...]


def plain_call(op: str, dtype: torch.dtype, scale: int = 1) -> Arguments:
    """Return all arguments of a call that any kernel of the op should take.

    Args:
        op: name of an op.
        dtype: the dtype that its kernel is chosen by.
        scale: the tensors have in the order of 64 * scale by 64 rows and columns.
    """
    return _CALLS[op](dtype, 64 * scale)


def _quantize(entries: int, codebook: str) -> Callable[[torch.dtype, int], Arguments]:
    def arguments(dtype: torch.dtype, rows: int) -> Arguments:
        table = cases.codebooks(entries)[codebook]
        return cases.values("normal", rows * 64, 64, dtype, table).view(rows, 64), table, 64

    return arguments


def _dequantize_blockwise(dtype: torch.dtype, rows: int) -> Arguments:
    codes = cases.int8_codes((rows, 64), -128).view(torch.uint8)
    return codes, cases.scales(rows), cases.codebooks(256)["dynamic"], 64, dtype


def _dequantize_4bit(dtype: torch.dtype, rows: int) -> Arguments:
    weight = cases.weight_4bit(rows * 64, 64)
    return (*weight.quantized, (rows, 64), dtype, weight.nested)


def _gemm_4bit(dtype: torch.dtype, rows: int) -> Arguments:
    weight = cases.weight_4bit(rows * 64, 64)
    x = cases.activations("normal", (rows // 16, 64), dtype)
    return (x, *weight.quantized, rows, 64, cases.bias(rows, dtype), weight.nested)


def _gemm_4bit_transposed(dtype: torch.dtype, rows: int) -> Arguments:
    weight = cases.weight_4bit(rows * 64, 64)
    return (cases.activations("normal", (rows // 16, rows), dtype), *weight.quantized, rows, 64, weight.nested)


def _grouped(features: Callable[[int], int]) -> Callable[[torch.dtype, int], Arguments]:
    def arguments(dtype: torch.dtype, rows: int) -> Arguments:
        experts = cases.weight_4bit(rows * 64, 64, experts=4)
        tokens = rows // 4
        offsets = torch.tensor([0, tokens // 2, tokens // 2, tokens - 1, tokens], dtype=torch.int32)
        x = cases.activations("normal", (tokens, features(rows)), dtype)
        return (x, *experts.quantized, offsets, rows, 64, experts.nested)

    return arguments


def _embedding_4bit(dtype: torch.dtype, rows: int) -> Arguments:
    weight = cases.weight_4bit(rows * 64, 64)
    return (torch.arange(rows).flip(0), *weight.quantized, rows, 64, dtype, weight.nested)


def _embedding_8bit(dtype: torch.dtype, rows: int) -> Arguments:
    return torch.arange(rows).flip(0), cases.int8_codes((rows, 64)), cases.scales(rows), dtype


def _int8_quantize(dtype: torch.dtype, rows: int) -> Arguments:
    return cases.activations("spiky", (rows, 64), dtype), 6.0


def _int8_matmul(dtype: torch.dtype, rows: int) -> Arguments:
    return cases.int8_codes((rows, 64)), cases.int8_codes((64, 64))


def _int8_matmul_dequant(dtype: torch.dtype, rows: int) -> Arguments:
    product = cases.int8_codes((rows, 64)).int() * 1001
    return product, cases.scales(rows), cases.scales(64), cases.bias(64, dtype), dtype


def _int8_dequantize_rows(dtype: torch.dtype, rows: int) -> Arguments:
    return cases.int8_codes((rows, 64)), cases.scales(rows), dtype


def _int8_linear(dtype: torch.dtype, rows: int) -> Arguments:
    x = cases.activations("spiky", (rows // 16, 64), dtype)
    return x, cases.int8_codes((rows, 64)), cases.scales(rows), cases.bias(rows, dtype), 6.0


def _int8_linear_transposed(dtype: torch.dtype, rows: int) -> Arguments:
    return cases.activations("normal", (rows // 16, rows), dtype), cases.int8_codes((rows, 64)), cases.scales(rows)


ADAM = Hyperparameters(beta1=0.9, beta2=0.99, eps=1e-4, weight_decay=0.1, decoupled_weight_decay=True)


def _step_32bit(dtype: torch.dtype, rows: int) -> Arguments:
    params, grads = ([cases.activations(kind, (rows, 64), dtype)] for kind in ("normal", "positive"))
    m, v = ([cases.activations(kind, (rows, 64), torch.float32)] for kind in ("normal", "positive"))
    return params, grads, m, v, [], "adam", ADAM, 3, 0.1


def _step_8bit(dtype: torch.dtype, rows: int) -> Arguments:
    params, grads, m, v, *_ = _step_32bit(dtype, rows)
    signed, unsigned = (cases.codebooks(256)[name] for name in ("dynamic", "dynamic_unsigned"))
    codes1, absmax1 = quantize_states(m, signed)
    codes2, absmax2 = quantize_states(v, unsigned)
    states: Arguments = (codes1, codes2, [], absmax1, absmax2, [])
    return (params, grads, *states, signed, unsigned, None, "adam", ADAM, 3, 0.1, OPTIMIZER_BLOCKSIZE)


def quantize_states(
    states: List[torch.Tensor], codebook: torch.Tensor, blocksize: int = OPTIMIZER_BLOCKSIZE
) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
    """Return the codes and absmax of contiguous optimizer states."""
    quantized = [quantize_blockwise(as_numpy(state), as_numpy(codebook), blocksize) for state in states]
    return [torch.from_numpy(codes) for codes, _ in quantized], [torch.from_numpy(absmax) for _, absmax in quantized]


_CALLS: Dict[str, Callable[[torch.dtype, int], Arguments]] = {
    "quantize_blockwise": _quantize(256, "dynamic"),
    "dequantize_blockwise": _dequantize_blockwise,
    "quantize_4bit": _quantize(16, "nf4"),
    "dequantize_4bit": _dequantize_4bit,
    "gemm_4bit": _gemm_4bit,
    "gemm_4bit_transposed": _gemm_4bit_transposed,
    "grouped_gemm_4bit": _grouped(lambda rows: 64),
    "grouped_gemm_4bit_transposed": _grouped(lambda rows: rows),
    "embedding_4bit": _embedding_4bit,
    "embedding_8bit": _embedding_8bit,
    "int8_quantize_rows": _int8_quantize,
    "int8_quantize_rows_cols": _int8_quantize,
    "int8_matmul": _int8_matmul,
    "int8_matmul_dequant": _int8_matmul_dequant,
    "int8_dequantize_rows": _int8_dequantize_rows,
    "int8_linear": _int8_linear,
    "int8_linear_transposed": _int8_linear_transposed,
    "optimizer_step_32bit_": _step_32bit,
    "optimizer_step_8bit_blockwise_": _step_8bit,
}
