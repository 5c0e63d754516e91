"""Bring states from a checkpoint to how their parameter is sharded now, and into its blocks, whichever way they were saved."""

from __future__ import annotations

import math
from typing import Any, Optional, Tuple

import torch

from bnb_core.ops import dequantize_blockwise, quantize_blockwise
from bnb_core.ops.checks import ceil_div
from bnb_core.ops.sharded import is_sharded, local_part, with_part
from bnb_core.ops.spec import OPTIMIZER_BLOCKSIZE
from bnb_core.optim.sharding import blocks_of, is_sharded_like, placements_like, shard_like
from bnb_core.optim.state_formats import Slot, Slots, State


def adapt(state: State, slots: Slots, param: torch.Tensor) -> None:
    """Bring the tensors of a parameter's slots from how they were saved to how the parameter is sharded.

    Blocks that stay as they were keep every bit. Where others are needed, the values are quantized again; where no blocks fit,
    they become 32-bit states. What fits in no way is left for the format to refuse. All processes must call this together, since
    tensors that are sharded otherwise are gathered.

    Args:
        state: of the parameter, with tensors that are whole or sharded in any way.
        slots: name the tensors.
        param: where the state is to be.
    """
    for slot in {slot.number: slot for slot in slots if slot is not None}.values():  # once where two slots share a tensor
        _adapt_slot(state, slot, param)


def _adapt_slot(state: State, slot: Slot, param: torch.Tensor) -> None:
    halves = slot.half is not None
    codes, absmax, codebook = (state.get(f"{name}{slot.number}") for name in ("state", "absmax", "qmap"))
    if not isinstance(codes, torch.Tensor) or codes.shape[halves:] != param.shape:
        return
    if codes.dtype != torch.uint8:
        if not is_sharded_like(param, codes, halves):
            state[slot.key] = _sharded(param, _whole(codes), halves)
        return
    if not isinstance(absmax, torch.Tensor) or not isinstance(codebook, torch.Tensor):
        return
    blocks, saved = blocks_of(param), tuple(absmax.shape[halves:])
    same = blocks is not None and blocks.shape == saved
    if same and all(is_sharded_like(param, tensor, halves) for tensor in (codes, absmax)):
        return
    size = blocks.size if same and blocks else _blocksize(tuple(param.shape), saved)
    if size is None:
        return
    codes, absmax = _whole(codes).contiguous(), _whole(absmax).contiguous()
    if blocks is None:
        state[slot.key] = _sharded(param, _dequantized(codes, absmax, codebook, size, halves), halves)
        del state[f"absmax{slot.number}"], state[f"qmap{slot.number}"]
        return
    if size != blocks.size:
        values = _dequantized(codes, absmax, codebook, size, halves)
        quantized = [quantize_blockwise(part, codebook, blocks.size) for part in (values if halves else [values])]
        codes, absmax = (torch.stack(tensors) for tensors in zip(*quantized))
    count = (2,) if halves else ()
    state[slot.key] = _sharded(param, codes.view(*count, *param.shape), halves)
    state[f"absmax{slot.number}"] = _sharded(param, absmax.view(*count, *blocks.shape), halves)


def _dequantized(codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, size: int, halves: bool) -> torch.Tensor:
    """Return what the codes of one state, or of two, stand for."""
    parts = zip(codes, absmax) if halves else [(codes, absmax)]
    values = [dequantize_blockwise(part.view(-1), scales.view(-1), codebook, size, torch.float32) for part, scales in parts]
    return torch.cat(values).view(codes.shape)


def _blocksize(shape: Tuple[int, ...], saved: Tuple[int, ...]) -> Optional[int]:
    """Return the elements of a block of a state of this shape, of which an absmax of the shape `saved` was saved; None if none."""
    if len(saved) == 1 and saved[0] == ceil_div(math.prod(shape), OPTIMIZER_BLOCKSIZE):
        return OPTIMIZER_BLOCKSIZE
    split = len(saved) - 1
    run = math.prod(shape[split:])
    fits = split > 0 and saved[:split] == shape[:split] and saved[-1] > 0 and run % saved[-1] == 0
    return run // saved[-1] if fits else None


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _sharded(param: torch.Tensor, whole: torch.Tensor, halves: bool) -> torch.Tensor:
    """Return the tensor sharded as the parameter is, from all of it, which each process has."""
    if not is_sharded(param):
        return whole
    from torch.distributed.tensor import Replicate

    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    replicated: Any = with_part(whole.contiguous(), param, whole.shape, [Replicate()] * mesh.ndim)
    part = local_part(replicated.redistribute(mesh, placements_like(param, halves)))
    return shard_like(param, part.clone(), tuple(whole.shape), halves)  # the part may be a view, which would keep all of it
