"""Embedding tables that are trained beside 8-bit optimizer states: `Embedding` and `StableEmbedding` (arXiv 2110.02861)."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch

from bnb_core.optim.manager import GlobalOptimManager


class _TrainedEmbedding(torch.nn.Embedding):
    """A table that starts from Xavier uniform values, and whose optimizer states are 32-bit in any optimizer of bnb_core."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keep_states_in_32_bits()

    def _keep_states_in_32_bits(self) -> None:
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def __setstate__(self, state: Dict[str, Any]) -> None:  # of copies and pickles, which are modules of their own
        super().__setstate__(state)
        self._keep_states_in_32_bits()

    def reset_parameters(self) -> None:
        """Fill the table with Xavier uniform values, and the row of `padding_idx` with zeros."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class Embedding(_TrainedEmbedding):
    """`torch.nn.Embedding` for training with 8-bit optimizers: its own optimizer states are 32-bit.

    Rows that are seldom looked up have gradients of very different sizes, which 8-bit states would blur (arXiv 2110.02861).
    The table starts from Xavier uniform values.

    Args:
        num_embeddings, embedding_dim: rows and columns of the table.
        padding_idx: a row that starts at zero and has no gradient.
        max_norm: rows that are looked up are scaled down, in the table, to this norm at most.
        norm_type: p of the p-norm that `max_norm` is about.
        scale_grad_by_freq: divide gradients by how often a row occurs in the batch.
        sparse: have sparse gradients.
        _weight: values to start from instead, [num_embeddings, embedding_dim].
        device: where to make the table.

    Shape:
        Input int32 or int64 [...], output [..., embedding_dim].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: Optional[int] = None,
        max_norm: Optional[float] = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Optional[torch.Tensor] = None,
        device: Any = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )


class StableEmbedding(_TrainedEmbedding):
    """`Embedding` followed by a layer norm: the stable embedding layer of arXiv 2110.02861.

    The norm is taken in torch's default dtype, whatever the module's own; the result has the table's dtype.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, device: as in
            `Embedding`.
        dtype: of the table; the norm's own parameters are of torch's default dtype.

    Attributes:
        norm: the `torch.nn.LayerNorm`.

    Shape:
        Input int32 or int64 [...], output [..., embedding_dim].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: Optional[int] = None,
        max_norm: Optional[float] = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Optional[torch.Tensor] = None,
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the normalized rows that `input` names."""
        dtype, norm = torch.get_default_dtype(), self.norm
        rows = super().forward(input).to(dtype)
        # The norm's parameters may have been cast with the module, and layer_norm takes one dtype.
        weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
        return torch.nn.functional.layer_norm(rows, norm.normalized_shape, weight, bias, norm.eps).to(self.weight.dtype)
