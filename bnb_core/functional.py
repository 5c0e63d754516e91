"""bitsandbytes' flat names for quantization: `import bnb_core.functional as F`."""

from bnb_core.quantization.blockwise import dequantize_blockwise, quantize_blockwise
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
from bnb_core.quantization.products import gemv_4bit
from bnb_core.quantization.state import QuantState

#: The 8-bit codebooks of blockwise quantization by name, on the CPU.
name2qmap = {"dynamic": create_dynamic_map(), "udynamic": create_dynamic_map(signed=False)}

__all__ = [
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
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "name2qmap",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
