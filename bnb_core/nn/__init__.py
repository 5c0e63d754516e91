"""Modules with quantized weights, and their parameters."""

from bnb_core.nn import modules as modules  # not in __all__: it holds the same classes
from bnb_core.nn.embedding import Embedding, StableEmbedding
from bnb_core.nn.experts import Experts4bit, Routing
from bnb_core.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from bnb_core.nn.linear8bit import Linear8bitLt
from bnb_core.nn.outlier_aware import OutlierAwareLinear
from bnb_core.nn.parameters import Int8Params, Params4bit
from bnb_core.nn.quantized_embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Experts4bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "Routing",
    "StableEmbedding",
]
