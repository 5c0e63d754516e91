"""Embedding tables that are stored quantized: `Embedding4bit`, `EmbeddingNF4`, `EmbeddingFP4`, `Embedding8bit`."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch

from bnb_core.errors import NotQuantizedError
from bnb_core.nn.module4bit import Module4bit
from bnb_core.nn.module8bit import Module8bit, ModuleState
from bnb_core.nn.parameters import Int8Params, Params4bit, plain_data
from bnb_core.nn.quantized_module import QuantizedModule, cast_dtype
from bnb_core.ops import embedding_4bit, embedding_8bit
from bnb_core.ops.checks import FLOAT_DTYPES
from bnb_core.quantization.codebooks import get_4bit_type


class _QuantizedTable(QuantizedModule, torch.nn.Embedding):
    """A table of which only the rows that are looked up are dequantized, into the module's `dtype`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Any, dtype: Optional[torch.dtype]) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype: torch.dtype = self.weight.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows that `input` names.

        Args:
            input: int32 or int64 [...], each in [0, num_embeddings).

        Returns:
            [..., embedding_dim] in the module's `dtype`.

        Raises:
            NotQuantizedError: the table has not been quantized.
            InvalidArgumentError: an index, a dtype or a device that is not accepted.
        """
        weight = self.weight
        statistics = self._statistics(weight)
        if statistics is None:
            raise self._not_quantized()
        rows = self._rows(input, plain_data(weight), statistics, self.dtype if self.dtype in FLOAT_DTYPES else torch.float32)
        return rows.to(self.dtype)

    def _rows(self, indices: torch.Tensor, data: torch.Tensor, statistics: Any, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def _not_quantized(self) -> NotQuantizedError:
        raise NotImplementedError

    def _weight_shape(self) -> Tuple[int, ...]:
        return self.num_embeddings, self.embedding_dim

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(fn, *args, **kwargs)
        self.dtype = cast_dtype(fn, self.dtype, self.weight.device)
        return result


class Embedding4bit(Module4bit, _QuantizedTable):
    """An embedding table of 4-bit codes (QLoRA, arXiv 2305.14314).

    Load floating-point values, then move the module to a device (`.to(device)`, `.cuda()`, `.cpu()`): that quantizes the table. Or
    load a checkpoint of a quantized one, into a module in any state. Only the rows that are looked up are dequantized.

    Args:
        num_embeddings, embedding_dim: rows and columns of the table; blocks may straddle rows.
        dtype: of the table before it is quantized, and of the output. Casting the module, as by `.half()`, changes the output's.
        quant_type: "fp4", "nf4", or the name of another codebook of 16 values.
        quant_storage: dtype that the packed bytes are stored as. A floating-point one lets them be sharded with other parameters.
        device: where to make the unquantized table; that does not quantize it.

    Shape:
        Input int32 or int64 [...], output [..., embedding_dim].

    Raises:
        InvalidArgumentError: a quant type that is not accepted.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: Optional[torch.dtype] = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        get_4bit_type(quant_type, "cpu")  # one that does not exist is refused now, not when the model moves
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.weight = Params4bit(
            self.weight.data, compress_statistics=False, quant_type=quant_type, quant_storage=quant_storage, module=self
        )

    def _rows(self, indices: torch.Tensor, data: torch.Tensor, statistics: Any, dtype: torch.dtype) -> torch.Tensor:
        return embedding_4bit(
            indices,
            self._bytes(data),
            statistics.absmax,
            statistics.code,
            statistics.blocksize,
            self.num_embeddings,
            self.embedding_dim,
            dtype,
            statistics.nested_statistics,
        )


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with `quant_type="nf4"`: codes for quantiles of the normal distribution (QLoRA, arXiv 2305.14314)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: Optional[torch.dtype] = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with `quant_type="fp4"`: codes of a sign, two exponent bits and one fraction bit."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: Optional[torch.dtype] = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class Embedding8bit(Module8bit, _QuantizedTable):
    """An embedding table of int8 codes, each row with its scale (LLM.int8, arXiv 2208.07339).

    It is quantized, moved, saved and loaded as `Embedding4bit` is.

    Args:
        num_embeddings, embedding_dim: rows and columns of the table.
        device: where to make the unquantized table; that does not quantize it.
        dtype: of the table before it is quantized, and of the output. Casting the module, as by `.half()`, changes the output's.

    Attributes:
        state: a `MatmulLtState` of which, once the table is quantized, `CB` is its codes and `SCB` the absmax of its rows, float32
            [num_embeddings].

    Shape:
        Input int32 or int64 [...], output [..., embedding_dim].
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: Optional[torch.dtype] = None) -> None:
        super().__init__(num_embeddings, embedding_dim, device, dtype)
        self.state = ModuleState(self)
        self.weight = Int8Params(self.weight.data, requires_grad=False)

    def _rows(self, indices: torch.Tensor, data: torch.Tensor, statistics: Any, dtype: torch.dtype) -> torch.Tensor:
        return embedding_8bit(indices, data, statistics, dtype)

    def _not_quantized(self) -> NotQuantizedError:
        return NotQuantizedError(
            "Embedding8bit: the table is not quantized; move the module to a device first, by .to(device), .cuda() or .cpu(), "
            "or load a checkpoint that has SCB"
        )
