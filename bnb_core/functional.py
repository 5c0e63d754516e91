"""bitsandbytes' flat names of functions: `import bnb_core.functional as F`."""

import torch

from bnb_core.ops.spec import INT8_MAX
from bnb_core.optim.updates import optimizer_update_8bit_blockwise, optimizer_update_32bit
from bnb_core.quantization.blockwise import dequantize_blockwise, quantize_blockwise
from bnb_core.quantization.checkpoint import pack_dict_to_tensor, unpack_tensor_to_dict
from bnb_core.quantization.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from bnb_core.quantization.four_bit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from bnb_core.quantization.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from bnb_core.quantization.placement import get_ptr, is_on_gpu
from bnb_core.quantization.products import gemv_4bit
from bnb_core.quantization.state import QuantState

#: The 8-bit codebooks of blockwise quantization by name, on the CPU.
name2qmap = {"dynamic": create_dynamic_map(), "udynamic": create_dynamic_map(signed=False)}

#: The largest code of int8 quantization.
C = float(INT8_MAX)
FIRST_CUDA_DEVICE = torch.device("cuda", index=0)


def has_avx512bf16() -> bool:
    """Return False: no weight is repacked for CPUs that have these instructions, and its state dict is that of any other."""
    return False


__all__ = [
    "FIRST_CUDA_DEVICE",
    "C",
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "has_avx512bf16",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]
