"""bitsandbytes' flat names of modules and parameters, and of what goes with them: `import bnb_core.nn.modules`."""

from bnb_core.nn.embedding import Embedding, StableEmbedding
from bnb_core.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from bnb_core.nn.linear8bit import Linear8bitLt
from bnb_core.nn.module4bit import fix_4bit_weight_quant_state_from_module
from bnb_core.nn.module8bit import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, maybe_rearrange_weight
from bnb_core.nn.outlier_aware import OutlierAwareLinear, OutlierTracer
from bnb_core.nn.parameters import Int8Params, Params4bit
from bnb_core.nn.quantized_embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4
from bnb_core.optim.manager import GlobalOptimManager
from bnb_core.quantization.state import QuantState

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "GlobalOptimManager",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "OutlierTracer",
    "Params4bit",
    "QuantState",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
    "maybe_rearrange_weight",
]
