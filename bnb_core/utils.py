"""bitsandbytes' flat names of helpers: `import bnb_core.utils`."""

from bnb_core.nn.module8bit import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING
from bnb_core.nn.outlier_aware import OutlierTracer, find_outlier_dims, outlier_hook
from bnb_core.nn.replacement import replace_linear
from bnb_core.quantization.checkpoint import pack_dict_to_tensor, unpack_tensor_to_dict
from bnb_core.quantization.placement import sync_gpu

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]
