"""What modules with a quantized weight share: moving it without touching its bytes, and loading it from any checkpoint."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch

from bnb_core.errors import CheckpointError
from bnb_core.nn.parameters import QuantizedParameter
from bnb_core.ops.sharded import is_sharded, local_part, with_part
from bnb_core.quantization.layout import as_bytes

_Move = Callable[[torch.Tensor], torch.Tensor]


class QuantizedModule(torch.nn.Module):
    """A module whose parameter `weight` is quantized when it moves to a device.

    What belongs to the codes, the statistics, is kept by the module and by the parameter. The parameter's come first: other
    libraries put parameters that they quantized themselves into modules. The module's serve where sharding, or whatever else, has
    left an ordinary parameter in place of ours.
    """

    weight: Any

    def _weight_shape(self) -> Tuple[int, ...]:
        """Return the shape of the weight before it is quantized."""
        raise NotImplementedError

    def _statistics(self, weight: Any) -> Any:
        """Return what belongs to the weight's codes; None if the weight is not quantized."""
        raise NotImplementedError

    def _keep_statistics(self, statistics: Any) -> None:
        """Set what belongs to the weight's codes, in the module and in its parameter."""
        raise NotImplementedError

    def _map_statistics(self, statistics: Any, move: _Move) -> Any:
        """Return a copy of the statistics, made by `move` from each of their tensors."""
        raise NotImplementedError

    def _adopt(self, weight: torch.Tensor) -> None:
        """Take over the statistics of a parameter that has become the weight."""
        raise NotImplementedError

    def _load_weight(self, entries: Dict[str, Any], assign: bool, missing: List[str], errors: List[str]) -> Set[str]:
        """Load the weight, unless that is only a matter of copying values into the parameter.

        Args:
            entries: the checkpoint's, by name within this module; "weight" is among them.
            assign: take the checkpoint's tensors, on their device, rather than copy them to the module's.
            missing: to be extended by the names of entries that the weight needs.
            errors: to be extended by what is wrong with the weight.

        Returns:
            The names of the entries that have been dealt with.

        Raises:
            CheckpointError: the entries contradict each other.
        """
        raise NotImplementedError

    def _parameter(self, name: str) -> Any:
        """Return an attribute that is a parameter, as a rule: in a tenth of the time that `torch.nn.Module` takes then."""
        return self._parameters[name] if name in self._parameters else getattr(self, name)

    def register_parameter(self, name: str, param: Any) -> None:
        """Register a parameter as any module does; a quantized weight brings its statistics."""
        super().register_parameter(name, param)
        if name == "weight" and param is not None:
            self._adopt(param)

    def _replace_weight(self, new: QuantizedParameter, assign: bool) -> None:
        """Make `new` the weight: the same parameter object as before, which may be tied to others, unless it is assigned."""
        old = self._parameters.get("weight")
        if isinstance(old, type(new)) and old.device.type == new.device.type and not assign:
            old.requires_grad_(new.requires_grad)
            old.data = new
            self._adopt(old)
        else:
            self.weight = new

    def _apply(self, fn: _Move, *args: Any, **kwargs: Any) -> Any:
        old, statistics = self._parameters.get("weight"), self._statistics(self.weight)
        renewed: Optional[QuantizedParameter] = None

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal renewed
            if tensor is not old:
                return fn(tensor)
            # Ordinary tensors: where torch has to make a new parameter, or swaps the old one for it, it cannot make one of ours.
            data = fn(tensor).data if statistics is None else move_bytes(fn, tensor.data)
            renewed = old._like(data) if isinstance(old, QuantizedParameter) else None
            return data

        super()._apply(convert, *args, **kwargs)
        new = self._parameters.get("weight")
        if old is None or new is None:
            return self
        if renewed is not None and not isinstance(new, QuantizedParameter):
            renewed.grad = new.grad
            if new is old:
                torch.utils.swap_tensors(new, renewed)
            else:
                self._parameters["weight"] = new = renewed
        if statistics is None:
            self._adopt(new)
        else:
            with torch.no_grad():
                self._keep_statistics(self._map_statistics(statistics, lambda tensor: move_bytes(fn, tensor)))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        strict: bool,
        missing_keys: List[str],
        unexpected_keys: List[str],
        error_msgs: List[str],
    ) -> None:
        hooks = self._load_state_dict_pre_hooks
        for hook in hooks.values():  # which may rename entries, or load them in their own way
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        entries = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        assign = local_metadata.get("assign_to_params_buffers", False)
        missing: List[str] = []
        done: Set[str] = set()
        was_meta = self.weight.is_meta
        if isinstance(entries.get("weight"), torch.Tensor):
            _require_equally_sharded(f"{prefix}weight", entries["weight"], self.weight)
            try:
                with torch.no_grad():
                    done = self._load_weight(entries, assign, missing, error_msgs)
            except CheckpointError as error:
                raise CheckpointError(f"{prefix}weight: {error}") from error
        rest = {prefix + name: value for name, value in entries.items() if name not in done}
        if was_meta and not self.weight.is_meta:
            self._bring_along(rest, prefix)
        self._load_state_dict_pre_hooks = type(hooks)()  # they have run
        try:
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        finally:
            self._load_state_dict_pre_hooks = hooks
        if "weight" in done and strict:
            missing_keys.remove(f"{prefix}weight")
        missing_keys.extend(prefix + name for name in missing)

    def _bring_along(self, rest: Dict[str, Any], prefix: str) -> None:
        """Make room for the other parameters, where the weight has come from the meta device to a checkpoint's."""
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.is_meta and isinstance(rest.get(prefix + name), torch.Tensor):
                room = torch.empty_like(parameter, device=rest[prefix + name].device)
                self._parameters[name] = torch.nn.Parameter(room, requires_grad=parameter.requires_grad)


def _require_equally_sharded(name: str, saved: torch.Tensor, weight: torch.Tensor) -> None:
    """Refuse to load a part of a weight into all of it, or the other way round."""
    if is_sharded(saved) != is_sharded(weight):
        which = (
            "the checkpoint's weight is sharded and the module's"
            if is_sharded(saved)
            else "the weight is sharded and the checkpoint's"
        )
        raise CheckpointError(
            f"{name}: {which} is not; use get_model_state_dict and set_model_state_dict of torch.distributed.checkpoint.state_dict "
            "with StateDictOptions(full_state_dict=True)"
        )


def move_bytes(move: _Move, tensor: torch.Tensor) -> torch.Tensor:
    """Apply a move to another device, or to shared memory, to a tensor that is to keep its dtype and every bit.

    What `torch.nn.Module` moves tensors by may cast them too, but never casts bytes, unless it casts whatever comes.
    """
    if is_sharded(tensor):
        whole: Any = tensor
        return with_part(move_bytes(move, local_part(tensor)), whole, whole.shape, whole.placements)
    data = as_bytes(tensor)
    moved = move(data)
    if moved.dtype != torch.uint8:
        moved = data.to(moved.device)
    return moved.view(tensor.dtype).view(tensor.shape)


def cast_dtype(move: _Move, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that what `torch.nn.Module` moves or casts tensors by makes of tensors of this dtype."""
    return move(torch.empty(1, dtype=dtype, device=device)).dtype
