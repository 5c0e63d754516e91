"""The weights of a mixture of experts in 4 bits, and who gets which token: `Experts4bit`, `Routing`."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.nn.module4bit import Module4bit, require_compute_dtype
from bnb_core.nn.parameters import Params4bit, plain_data
from bnb_core.ops import grouped_gemm_4bit
from bnb_core.ops.indices import check_index_values, require_indices
from bnb_core.ops.plain import ordinary_execution
from bnb_core.quantization.codebooks import get_4bit_type
from bnb_core.quantization.int8 import as_rows


class Routing:
    """The order of tokens by expert, made once for all the layers that the experts consist of.

    Nothing here synchronizes with the device.

    Args:
        experts: the experts chosen for each token, int32 or int64 [tokens, top_k], each in [0, num_experts).
        num_experts: how many there are.

    Attributes:
        offsets: int32 [num_experts + 1]; of what `send` returns, rows offsets[e] to offsets[e+1] belong to expert e.

    Raises:
        InvalidArgumentError: a dtype or shape that is not accepted; or an expert that does not exist, which is only checked on the
            CPU, where reading is free.

    Example:
        >>> routing = Routing(scores.topk(2).indices, num_experts=8)
        >>> hidden = torch.relu(up(routing.send(x), routing.offsets))
        >>> y = routing.combine(down(hidden, routing.offsets), weights)
    """

    def __init__(self, experts: torch.Tensor, num_experts: int) -> None:
        require_indices("Routing", experts)
        if experts.dim() != 2:
            raise InvalidArgumentError(f"Routing: experts have shape {list(experts.shape)}; it must be [tokens, top_k]")
        if experts.device.type == "cpu" and ordinary_execution():
            check_index_values("Routing", experts, num_experts)
        self.choices = experts.shape
        # Stable, so that equal choices are always computed in the same order.
        by_expert, self._order = experts.reshape(-1).sort(stable=True)
        bounds = torch.arange(num_experts + 1, dtype=by_expert.dtype, device=experts.device)
        self.offsets = torch.searchsorted(by_expert, bounds, out_int32=True)

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """Return a row for each choice of each token, sorted by expert.

        Args:
            x: [tokens, features].

        Returns:
            [tokens * top_k, features].

        Raises:
            InvalidArgumentError: another number of tokens.
        """
        tokens, top_k = self.choices
        if x.dim() != 2 or x.shape[0] != tokens:
            raise InvalidArgumentError(
                f"Routing: x has shape {list(x.shape)}; it must be [{tokens}, features], a row for each token"
            )
        return x.index_select(0, torch.div(self._order, max(top_k, 1), rounding_mode="floor"))

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Add up what the experts made of each token. Differentiable in both arguments.

        Args:
            y: [tokens * top_k, features], in the order that `send` gave.
            weights: what each choice counts, floating-point [tokens, top_k].

        Returns:
            [tokens, features] in y's dtype; summed in the wider of the two dtypes.

        Raises:
            InvalidArgumentError: a shape that does not fit the choices.
        """
        tokens, top_k = self.choices
        if weights.shape != self.choices:
            raise InvalidArgumentError(
                f"Routing: weights have shape {list(weights.shape)}; it must be that of the experts, {list(self.choices)}"
            )
        if y.dim() != 2 or y.shape[0] != tokens * top_k:
            raise InvalidArgumentError(
                f"Routing: y has shape {list(y.shape)}; it must be [{tokens * top_k}, features], a row for each choice"
            )
        places = torch.empty_like(self._order)
        places[self._order] = torch.arange(tokens * top_k, device=places.device)
        chosen = y.index_select(0, places).view(tokens, top_k, y.shape[1])
        return (chosen * weights.unsqueeze(-1)).sum(1).to(y.dtype)


class Experts4bit(Module4bit):
    """A linear layer for each expert, without biases, with 4-bit weights in one tensor (QLoRA, arXiv 2305.14314).

    It is quantized, moved, saved and loaded as `Linear4bit` is. Its state dict is that of a parameter `weight` which
    `replace_parameter_4bit` has quantized, in bitsandbytes too.

    The weights are multiplied in `compute_dtype`; without one, in the dtype of each input. The result has the input's dtype.
    Gradients flow to the input; the weights have none.

    Args:
        num_experts: E.
        input_features, output_features: K and N; a block of 64 weights must not span two experts, so K * N is a multiple of 64.
        compute_dtype: float32, float16 or bfloat16.
        compress_statistics: quantize the block scales too ("double quantization").
        quant_type: "nf4", "fp4", or the name of another codebook of 16 values.
        quant_storage: dtype that the packed bytes are stored as. A floating-point one lets them be sharded with other parameters.
        device: where to make the unquantized weight, [E, N, K]; that does not quantize it.

    Raises:
        InvalidArgumentError: a quant type or dtype that is not accepted.
    """

    def __init__(
        self,
        num_experts: int,
        input_features: int,
        output_features: int,
        compute_dtype: Optional[torch.dtype] = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        get_4bit_type(quant_type, "cpu")  # one that does not exist is refused now, not when the model moves
        require_compute_dtype(type(self).__name__, compute_dtype)
        super().__init__()
        self.num_experts = num_experts
        self.in_features = input_features
        self.out_features = output_features
        self.compute_dtype = compute_dtype
        bound = max(input_features, 1) ** -0.5  # as torch.nn.Linear starts
        values = torch.empty(num_experts, output_features, input_features, device=device).uniform_(-bound, bound)
        self.weight = Params4bit(
            values, compress_statistics=compress_statistics, quant_type=quant_type, quant_storage=quant_storage, module=self
        )
        self._require_whole_blocks(self.weight.blocksize)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Multiply rows that are sorted by expert, each by its expert's weight: x W_e^T.

        Args:
            x: float32, float16 or bfloat16 [rows, K]; any floating-point dtype if the module has a compute dtype.
            offsets: int32 [E + 1], rising from 0 to the number of rows; rows offsets[e] to offsets[e+1] belong to expert e.

        Returns:
            [rows, N] in x's dtype.

        Raises:
            NotQuantizedError: the weights have not been quantized.
            InvalidArgumentError: a dtype, shape, device or offset that is not accepted, or a checkpoint's blocks span two experts.
        """
        weight = self.weight
        state = self._statistics(weight)
        if state is None:
            raise self._not_quantized()
        self._require_whole_blocks(state.blocksize)
        experts, N, K = state.shape
        y = grouped_gemm_4bit(
            x.to(self.compute_dtype or x.dtype),
            self._bytes(plain_data(weight)).view(experts, N * K // 2),
            state.absmax.view(experts, N * K // state.blocksize),
            state.code,
            state.blocksize,
            offsets,
            N,
            K,
            state.nested_statistics,
        )
        return y.to(x.dtype)

    def mix(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of what the chosen experts make of each token, in any order of tokens.

        Args:
            x: float32, float16 or bfloat16 [..., K].
            experts: the experts chosen for each token, int32 or int64 [..., top_k], each in [0, E).
            weights: what each choice counts, floating-point [..., top_k].

        Returns:
            [..., N] in x's dtype.

        Raises:
            NotQuantizedError: the weights have not been quantized.
            InvalidArgumentError: a dtype, shape or device that is not accepted, or an expert that does not exist.
        """
        name = type(self).__name__
        if not x.shape[:-1] == experts.shape[:-1] == weights.shape[:-1]:
            raise InvalidArgumentError(
                f"{name}: x {list(x.shape)}, experts {list(experts.shape)} and weights {list(weights.shape)} must agree in all "
                "dimensions but the last"
            )
        routing = Routing(as_rows(name, "experts", experts), self.num_experts)
        rows = self(routing.send(as_rows(name, "x", x)), routing.offsets)
        y = routing.combine(rows, as_rows(name, "weights", weights))
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return what the module's representation shows."""
        return f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"

    def _weight_shape(self) -> Tuple[int, ...]:
        return self.num_experts, self.out_features, self.in_features

    def _require_whole_blocks(self, blocksize: int) -> None:
        if self.in_features * self.out_features % blocksize:
            raise InvalidArgumentError(
                f"{type(self).__name__}: blocks of {blocksize} do not divide an expert's {self.out_features} x {self.in_features} "
                "weights; use sizes or a blocksize that fit, or replace_parameter_4bit, which takes any"
            )
