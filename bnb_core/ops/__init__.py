"""What each op is: one function for every entry of `bnb_core.ops.spec.OPS`, loaded at first use.

From torch 2.4 on, loading them also registers `torch.ops.bnb.*`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, List

from bnb_core.ops.spec import OPS, Hyperparameters, Nested

if TYPE_CHECKING:
    from bnb_core.ops.blockwise import dequantize_blockwise, quantize_blockwise
    from bnb_core.ops.four_bit import (
        dequantize_4bit,
        embedding_4bit,
        gemm_4bit,
        gemm_4bit_transposed,
        grouped_gemm_4bit,
        grouped_gemm_4bit_transposed,
        quantize_4bit,
    )
    from bnb_core.ops.int8 import (
        embedding_8bit,
        int8_dequantize_rows,
        int8_linear,
        int8_linear_transposed,
        int8_matmul,
        int8_matmul_dequant,
        int8_quantize_rows,
        int8_quantize_rows_cols,
    )
    from bnb_core.ops.optimizer import optimizer_step_8bit_blockwise_, optimizer_step_32bit_

_FAMILIES = ("blockwise", "four_bit", "int8", "optimizer")

__all__ = [
    "Hyperparameters",
    "Nested",
    "dequantize_4bit",
    "dequantize_blockwise",
    "embedding_4bit",
    "embedding_8bit",
    "gemm_4bit",
    "gemm_4bit_transposed",
    "grouped_gemm_4bit",
    "grouped_gemm_4bit_transposed",
    "int8_dequantize_rows",
    "int8_linear",
    "int8_linear_transposed",
    "int8_matmul",
    "int8_matmul_dequant",
    "int8_quantize_rows",
    "int8_quantize_rows_cols",
    "optimizer_step_8bit_blockwise_",
    "optimizer_step_32bit_",
    "quantize_4bit",
    "quantize_blockwise",
]


def __getattr__(name: str) -> Any:
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for family in _FAMILIES:
        module = importlib.import_module(f"{__name__}.{family}")
        globals().update({op: function for op, function in vars(module).items() if op in OPS})
    return globals()[name]


def __dir__() -> List[str]:
    return __all__
