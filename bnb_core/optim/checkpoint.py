"""The form that optimizers have in checkpoints, which is bitsandbytes': translated on the way out and on the way in."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence

import torch

from bnb_core.errors import CheckpointError
from bnb_core.optim.state_formats import TENSOR_KEYS, State, interned_codebook

#: Key that quantized tensors of a parameter are kept under, so that tools which gather states (FSDP) leave them alone.
WRAPPER = "__bnb_optimizer_quant_state__"
#: What bitsandbytes needs to find where max_unorm is set; it holds nothing that outlives a step.
_UNORM = "unorm_vec"


class _Untouched:
    """Carries a tensor past `torch.optim.Optimizer.load_state_dict`, which would cast it to the dtype of the parameter."""

    def __init__(self, tensor: torch.Tensor, move: bool) -> None:
        self._tensor = tensor
        self._move = move

    def __deepcopy__(self, memo: Any) -> "_Untouched":
        return self

    def copy_for(self, param: torch.Tensor) -> torch.Tensor:
        return self._tensor.detach().to(param.device if self._move else self._tensor.device, copy=True)


def save_state(state: State, max_unorm: float) -> State:
    """Return a parameter's state as a checkpoint has it."""
    saved = {key: value for key, value in state.items() if key not in TENSOR_KEYS}
    # Codebooks are one tensor for all parameters, which sharded checkpointing would read others into.
    tensors = {key: value.clone() if key.startswith("qmap") else value for key, value in state.items() if key in TENSOR_KEYS}
    if "step" in state:
        saved["step"] = int(state["step"])
    if tensors:
        if max_unorm > 0.0:
            tensors[_UNORM] = torch.zeros(1, device=next(iter(tensors.values())).device)
        saved[WRAPPER] = tensors
    return saved


def load_state(saved: Mapping[str, Any], move_to_device: bool) -> State:
    """Return a state from a checkpoint, with or without the wrapper, for `torch.optim.Optimizer` to hand out and `settle_state`.

    Raises:
        CheckpointError: the step count is no number.
    """
    flat = {key: value for key, value in saved.items() if key != WRAPPER}
    flat.update(saved.get(WRAPPER, {}))
    flat.pop(_UNORM, None)
    if "step" in flat:
        try:
            flat["step"] = int(flat["step"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"optimizer state: step is {flat['step']!r}; it must be a number") from error
    for key in TENSOR_KEYS & flat.keys():
        if isinstance(flat[key], torch.Tensor):
            flat[key] = _Untouched(flat[key], move_to_device)
    return flat


def settle_state(state: State, param: torch.Tensor) -> None:
    """Unpack what `load_state` packed, and have equal codebooks be one tensor again, since a call takes one for all parameters."""
    for key in TENSOR_KEYS & state.keys():
        if isinstance(state[key], _Untouched):
            state[key] = state[key].copy_for(param)
        if key.startswith("qmap"):
            state[key] = interned_codebook(state[key])


def save_group(group: Mapping[str, Any], in_betas: Sequence[str]) -> Dict[str, Any]:
    """Return a parameter group as a checkpoint has it: numbers instead of tensors, and every key that bitsandbytes reads.

    Args:
        group: the group.
        in_betas: options that bitsandbytes keeps as "betas", where the algorithm has no option of that name.
    """
    saved = {key: value.item() if _is_number(value) else value for key, value in group.items() if key != "capturable"}
    saved.setdefault("betas", (*(group[name] for name in in_betas), 0.0, 0.0)[:2])
    saved.setdefault("eps", 0.0)
    return saved


def load_group(
    saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any], in_betas: Sequence[str]
) -> Dict[str, Any]:
    """Return a parameter group from a checkpoint. What it does not say stays as it is now; so does where step and lr are kept."""
    group = spread_betas(saved, defaults, in_betas)
    if "eps" not in defaults:
        group.pop("eps", None)
    group["capturable"] = current["capturable"]
    if isinstance(current["lr"], torch.Tensor):
        group["lr"] = torch.full_like(current["lr"], float(group["lr"]))
    for key, value in current.items():
        if key not in ("params", "param_names"):
            group.setdefault(key, value)
    return group


def spread_betas(options: Mapping[str, Any], defaults: Mapping[str, Any], in_betas: Sequence[str]) -> Dict[str, Any]:
    """Return options with bitsandbytes' "betas" under the names that an algorithm without betas has for them."""
    spread = dict(options)
    if "betas" not in defaults:
        for name, value in zip(in_betas, spread.pop("betas", ())):
            spread.setdefault(name, value)
    return spread


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1
