"""What the results of a call must be: the oracle's answer to its arguments, and how near results must come to it."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import torch

from bnb_core.ops.optimizer import is_dense
from bnb_core.ops.spec import Hyperparameters, Nested, OpSpec
from bnb_core.testing import optimizer_oracle, oracle
from bnb_core.testing.tolerances import as_numpy, as_torch, assert_identical, assert_product, assert_quantized, assert_rounded

#: Fails unless the results (outputs, then lists that were updated) are right.
Check = Callable[[Sequence[Any]], None]


def expectation(spec: OpSpec, args: Tuple[Any, ...]) -> Check:
    """Work out what a call must give, from all its arguments on the CPU."""
    return _EXPECTATIONS[spec.name](**{parameter.name: value for parameter, value in zip(spec.parameters, args)})


def _exact(names: Sequence[str], *expected: Tuple[np.ndarray, torch.dtype]) -> Check:
    tensors = [as_torch(values, dtype) for values, dtype in expected]

    def check(results: Sequence[Any]) -> None:
        for name, actual, tensor in zip(names, results, tensors):
            assert_identical(actual, tensor.view(actual.shape), name)

    return check


def _product(name: str, product: oracle.Product) -> Check:
    return lambda results: assert_product(results[0], product, name)


# --------------------------------------------------------------------------------------------------------- blocks and 4-bit weights


def _quantize_blockwise(x: torch.Tensor, codebook: torch.Tensor, blocksize: int) -> Check:
    codes, absmax = oracle.quantize_blockwise(as_numpy(x), as_numpy(codebook), blocksize)
    return _exact(("codes", "absmax"), (codes, torch.uint8), (absmax, torch.float32))


def _quantize_4bit(x: torch.Tensor, codebook: torch.Tensor, blocksize: int) -> Check:
    packed, absmax = oracle.quantize_4bit(as_numpy(x), as_numpy(codebook), blocksize)
    return _exact(("packed", "absmax"), (packed, torch.uint8), (absmax, torch.float32))


def _dequantize_blockwise(
    codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> Check:
    values = oracle.dequantize_blockwise(as_numpy(codes), as_numpy(absmax), as_numpy(codebook), blocksize)
    return _exact(("x",), (values, dtype))


def _values_4bit(
    packed: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int, nested: Optional[Nested], n: int
) -> np.ndarray:
    """Dequantize the first n elements of each row of `packed`, or of all of it if it has no rows, to float32."""
    scales = as_numpy(absmax)
    if nested is not None:
        scales = oracle.nested_absmax(
            scales, as_numpy(nested.absmax), as_numpy(nested.codebook), as_numpy(nested.offset), nested.blocksize
        )
    rows = [
        oracle.dequantize_blockwise(oracle.unpack(row, n), row_scales, as_numpy(codebook), blocksize)
        for row, row_scales in zip(np.atleast_2d(as_numpy(packed)), np.atleast_2d(scales))
    ]
    return np.stack(rows) if packed.dim() == 2 else rows[0]


def _dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    shape: Tuple[int, ...],
    dtype: torch.dtype,
    nested: Optional[Nested],
) -> Check:
    n = int(np.prod(shape, dtype=np.int64))
    return _exact(("x",), (_values_4bit(packed, absmax, codebook, blocksize, nested, n), dtype))


def _embedding_4bit(
    indices: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    nested: Optional[Nested],
) -> Check:
    table = _values_4bit(packed, absmax, codebook, blocksize, nested, num_embeddings * embedding_dim)
    return _exact(("x",), (table.reshape(num_embeddings, embedding_dim)[as_numpy(indices)], dtype))


def _gemm_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    bias: Optional[torch.Tensor],
    nested: Optional[Nested],
) -> Check:
    weight = _values_4bit(packed, absmax, codebook, blocksize, nested, N * K).reshape(N, K)
    return _product("y", oracle.product(as_numpy(x).reshape(-1, K), weight, None if bias is None else as_numpy(bias)))


def _gemm_4bit_transposed(
    g: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    N: int,
    K: int,
    nested: Optional[Nested],
) -> Check:
    weight = _values_4bit(packed, absmax, codebook, blocksize, nested, N * K).reshape(N, K)
    return _product("grad_x", oracle.product(as_numpy(g).reshape(-1, N), weight.T))


def _grouped_gemm_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    blocksize: int,
    offsets: torch.Tensor,
    N: int,
    K: int,
    nested: Optional[Nested],
    x: Optional[torch.Tensor] = None,
    g: Optional[torch.Tensor] = None,
) -> Check:
    experts = _values_4bit(packed, absmax, codebook, blocksize, nested, N * K).reshape(-1, N, K)
    if g is not None:
        return _product("grad_x", oracle.grouped_product(as_numpy(g), experts.transpose(0, 2, 1), as_numpy(offsets)))
    assert x is not None
    return _product("y", oracle.grouped_product(as_numpy(x), experts, as_numpy(offsets)))


# ------------------------------------------------------------------------------------------------------------------------- LLM.int8


def _int8_quantize_rows(x: torch.Tensor, threshold: float) -> Check:
    codes, absmax, outlier_mask = oracle.int8_quantize_rows(as_numpy(x), threshold)
    return _exact(("codes", "absmax", "outlier_mask"), (codes, torch.int8), (absmax, torch.float32), (outlier_mask, torch.bool))


def _int8_quantize_rows_cols(x: torch.Tensor, threshold: float) -> Check:
    row_codes, row_absmax, col_codes, col_absmax, outlier_mask = oracle.int8_quantize_rows_cols(as_numpy(x), threshold)
    return _exact(
        ("row_codes", "row_absmax", "col_codes", "col_absmax", "outlier_mask"),
        (row_codes, torch.int8),
        (row_absmax, torch.float32),
        (col_codes, torch.int8),
        (col_absmax, torch.float32),
        (outlier_mask, torch.bool),
    )


def _int8_matmul(a: torch.Tensor, b: torch.Tensor) -> Check:
    return _exact(("product",), (oracle.int8_matmul(as_numpy(a), as_numpy(b)), torch.int32))


def _int8_matmul_dequant(
    product: torch.Tensor,
    row_absmax: torch.Tensor,
    col_absmax: torch.Tensor,
    bias: Optional[torch.Tensor],
    dtype: torch.dtype,
) -> Check:
    return _product(
        "y",
        oracle.int8_matmul_dequant(
            as_numpy(product), as_numpy(row_absmax), as_numpy(col_absmax), None if bias is None else as_numpy(bias)
        ),
    )


def _int8_dequantize_rows(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> Check:
    return _exact(("x",), (oracle.int8_dequantize(as_numpy(codes), as_numpy(absmax)), dtype))


def _embedding_8bit(indices: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> Check:
    return _exact(("x",), (oracle.int8_dequantize(as_numpy(codes), as_numpy(absmax))[as_numpy(indices)], dtype))


def _int8_linear(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, bias: Optional[torch.Tensor], threshold: float
) -> Check:
    rows = as_numpy(x).reshape(-1, codes.shape[1])
    bias_values = None if bias is None else as_numpy(bias)
    return _product("y", oracle.int8_linear(rows, as_numpy(codes), as_numpy(absmax), bias_values, threshold))


def _int8_linear_transposed(g: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> Check:
    rows = as_numpy(g).reshape(-1, codes.shape[0])
    return _product("grad_x", oracle.int8_linear_transposed(rows, as_numpy(codes), as_numpy(absmax)))


# ----------------------------------------------------------------------------------------------------------------------- optimizers

Tensors = Sequence[torch.Tensor]


def _flat(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Flatten a tensor in the storage order of its parameter, in which 8-bit states have their blocks."""
    order = list(range(param.dim()))
    if is_dense(param):  # any other is updated as a contiguous copy
        order.sort(key=param.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _float64(tensor: torch.Tensor) -> np.ndarray:
    return as_numpy(tensor).astype(np.float64)


def _number(value: Any) -> float:
    return value.item() if isinstance(value, torch.Tensor) else value


def _optimizer_step_32bit_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Any,
    lr: Any,
) -> Check:
    steps = []
    for i, param in enumerate(params):
        states = tuple(_float64(state[i]) if state else None for state in (state1, state2, state3))
        steps.append(
            optimizer_oracle.step(
                algorithm, hyperparameters, int(_number(step)), _number(lr), _float64(param), _float64(grads[i]), states
            )
        )

    def check(results: Sequence[Any]) -> None:
        for i, expected in enumerate(steps):
            assert_rounded(results[0][i], expected.param, f"params[{i}]")
            for at, state in enumerate(expected.states, 1):
                if state is not None:
                    assert_rounded(results[at][i], state, f"state{at}[{i}]")

    return check


def _optimizer_step_8bit_blockwise_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    absmax3: Tensors,
    codebook1: Optional[torch.Tensor],
    codebook2: Optional[torch.Tensor],
    codebook3: Optional[torch.Tensor],
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Any,
    lr: Any,
    blocksize: int,
) -> Check:
    codebooks = (codebook1, codebook2, codebook3)

    def values(param: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor) -> np.ndarray:
        flat = as_numpy(_flat(codes, param))
        return oracle.dequantize_blockwise(flat, as_numpy(absmax), as_numpy(codebook), blocksize).astype(np.float64)

    steps = []
    for i, param in enumerate(params):
        states = tuple(
            values(param, codes[i], absmax[i], codebook) if codes and codebook is not None else None
            for codes, absmax, codebook in zip((state1, state2, state3), (absmax1, absmax2, absmax3), codebooks)
        )
        p, g = _float64(_flat(param, param)), _float64(_flat(grads[i], param))
        steps.append(optimizer_oracle.step(algorithm, hyperparameters, int(_number(step)), _number(lr), p, g, states))

    def check(results: Sequence[Any]) -> None:
        new_states, new_absmax = results[1:4], results[4:7]
        for i, (param, expected) in enumerate(zip(params, steps)):
            assert_rounded(_flat(results[0][i], param), expected.param, f"params[{i}]")
            for at, (state, codebook) in enumerate(zip(expected.states, codebooks)):
                if state is not None and codebook is not None:
                    codes = _flat(new_states[at][i], param)
                    assert_quantized(codes, new_absmax[at][i], codebook, blocksize, state, f"state{at + 1}[{i}]")

    return check


_EXPECTATIONS: Dict[str, Callable[..., Check]] = {
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "gemm_4bit": _gemm_4bit,
    "gemm_4bit_transposed": _gemm_4bit_transposed,
    "grouped_gemm_4bit": _grouped_gemm_4bit,
    "grouped_gemm_4bit_transposed": _grouped_gemm_4bit,
    "embedding_4bit": _embedding_4bit,
    "embedding_8bit": _embedding_8bit,
    "int8_quantize_rows": _int8_quantize_rows,
    "int8_quantize_rows_cols": _int8_quantize_rows_cols,
    "int8_matmul": _int8_matmul,
    "int8_matmul_dequant": _int8_matmul_dequant,
    "int8_dequantize_rows": _int8_dequantize_rows,
    "int8_linear": _int8_linear,
    "int8_linear_transposed": _int8_linear_transposed,
    "optimizer_step_32bit_": _optimizer_step_32bit_,
    "optimizer_step_8bit_blockwise_": _optimizer_step_8bit_blockwise_,
}
