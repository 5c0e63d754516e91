"""What modules with a 4-bit weight share: its statistics, and how checkpoints have them."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, Optional, Set

import torch

from bnb_core.errors import InvalidArgumentError, NotQuantizedError
from bnb_core.nn.parameters import Params4bit, map_quant_state
from bnb_core.nn.quantized_module import QuantizedModule
from bnb_core.ops.checks import FLOAT_DTYPES
from bnb_core.ops.sharded import is_sharded
from bnb_core.quantization.checkpoint import PACKED_PREFIX
from bnb_core.quantization.layout import as_bytes
from bnb_core.quantization.state import QuantState

#: Start of the name under which a checkpoint has the statistics that are not tensors.
_PACKED = f"quant_state.{PACKED_PREFIX}"


class Module4bit(QuantizedModule):
    """A module of which `weight` is a `Params4bit`, and `quant_state` the statistics that belong to its codes."""

    quant_state: Optional[QuantState] = None
    quant_storage: torch.dtype = torch.uint8

    def _not_quantized(self) -> NotQuantizedError:
        return NotQuantizedError(
            f"{type(self).__name__}: the weight is not quantized; move the module to a device first, "
            "by .to(device), .cuda() or .cpu()"
        )

    def _bytes(self, data: torch.Tensor) -> torch.Tensor:
        """Return the packed bytes of the weight's data.

        Raises:
            InvalidArgumentError: something that took the codes for numbers has cast them.
        """
        if data.dtype != torch.uint8 and data.dtype != self.quant_storage and not isinstance(self.weight, Params4bit):
            raise InvalidArgumentError(
                f"{type(self).__name__}: the packed weight was stored as {self.quant_storage} and has been cast to {data.dtype}, "
                "which destroys it; where mixed precision casts what it gathers, choose its param_dtype as quant_storage, or "
                "torch.uint8"
            )
        return as_bytes(data)

    # ---------------------------------------------------------------------------------------------------------------- statistics

    def _statistics(self, weight: Any) -> Optional[QuantState]:
        if not getattr(weight, "bnb_quantized", True):
            return None
        state = getattr(weight, "quant_state", None)
        return self.quant_state if state is None else state

    def _keep_statistics(self, statistics: QuantState) -> None:
        self.quant_state = statistics
        if isinstance(self.weight, Params4bit):
            self.weight.quant_state = statistics
        else:
            self._name_entries(statistics)

    def _map_statistics(self, statistics: QuantState, move: Any) -> QuantState:
        return map_quant_state(statistics, move)

    def _adopt(self, weight: torch.Tensor) -> None:
        if isinstance(weight, Params4bit):
            self.quant_state = weight.quant_state if weight.bnb_quantized else None
            self.quant_storage = weight.dtype if weight.bnb_quantized else weight.quant_storage

    # --------------------------------------------------------------------------------------------------------------- checkpoints

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self._statistics(self.weight)
        if state is not None:
            for name, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = value if keep_vars else value.detach()
            self._name_entries(state)

    def _name_entries(self, state: QuantState) -> None:
        """Have sharded checkpointing find a sharded weight's entries by their names, as it does those of a `Params4bit`."""
        if is_sharded(self.weight):
            self.weight.quant_state = state  # which has "quant_state.bitsandbytes__nf4"
            for name, value in state.as_dict().items():
                if isinstance(value, torch.Tensor):
                    setattr(self.weight, name, value)

    def _load_weight(self, entries: Dict[str, Any], assign: bool, missing: List[str], errors: List[str]) -> Set[str]:
        source = entries["weight"].data
        saved = {name[len("weight.") :]: value for name, value in entries.items() if name.startswith("weight.")}
        shape = self._weight_shape()
        if not saved and tuple(source.shape) == shape:
            return self._load_values(source, assign)
        if not saved and source.numel() * source.element_size() != (math.prod(shape) + 1) // 2:
            return set()
        handled = {"weight", *(f"weight.{name}" for name in saved)}
        described = self.weight if self.quant_state is None else self.quant_state
        missing.extend(f"weight.{name}" for name in missing_statistics(saved, described.quant_type))
        if missing:
            return handled
        if is_sharded(self.weight):
            return handled - self._load_sharded(source, saved, errors)
        device = source.device if assign or self.weight.is_meta else self.weight.device
        new = Params4bit.from_prequantized(source, saved, device=device)
        assert new.quant_state is not None
        if tuple(new.quant_state.shape) != shape:
            found = list(new.quant_state.shape)
            errors.append(f"size mismatch: the checkpoint's weight is of shape {found}, the module's of shape {list(shape)}.")
            return handled
        if not assign and source.device == device:
            new = new._moved(torch.clone)
        new.module = self
        self._replace_weight(new, assign)
        return handled

    def _load_sharded(self, source: torch.Tensor, saved: Dict[str, Any], errors: List[str]) -> Set[str]:
        """Load the statistics of a sharded weight, and return what is left to load as it would be in any module: the codes."""
        state = QuantState.from_dict(saved, device=self.weight.device)
        if tuple(state.shape) != self._weight_shape() or source.dtype != self.weight.dtype:
            errors.append(
                f"the checkpoint's weight is of shape {list(state.shape)} in {source.dtype}, the module's of shape "
                f"{list(self._weight_shape())} in {self.weight.dtype}; a sharded one cannot be replaced by another kind."
            )
            return set()
        self._keep_statistics(map_quant_state(state, torch.clone))
        return {"weight"}

    def _load_values(self, source: torch.Tensor, assign: bool) -> Set[str]:
        """Load floating-point values."""
        weight, quantized = self.weight, self._statistics(self.weight) is not None
        if not isinstance(weight, Params4bit) or not (assign or quantized):
            return set()
        new = weight._like(source if assign else source.clone(), module=self, quant_state=None, bnb_quantized=False)
        self._replace_weight(new.to(weight.device) if quantized else new, assign)
        return {"weight"}


def fix_4bit_weight_quant_state_from_module(module: Module4bit) -> None:
    """Give the weight of a 4-bit module back what its codes stand for, from the copy that the module keeps.

    The modules of bnb_core do without; this is for code that looks at the weight after FSDP has replaced it by an ordinary one.

    Args:
        module: left as it is where its weight has a quant_state.
    """
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    if not isinstance(weight, Params4bit):
        module.weight = Params4bit(weight, quant_storage=weight.dtype, bnb_quantized=True, quant_state=module.quant_state)
    else:
        weight.quant_state = module.quant_state


def require_compute_dtype(module: str, dtype: Optional[torch.dtype]) -> None:
    """Refuse dtypes that products with a 4-bit weight are not computed in.

    Args:
        module: name of the module's class.
        dtype: None for the dtype of each input.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise InvalidArgumentError(
            f"{module}: compute_dtype is {dtype}; it must be torch.float32, torch.float16 or torch.bfloat16, or None for the dtype "
            "of each input"
        )


def missing_statistics(saved: Mapping[str, Any], quant_type: Optional[str]) -> List[str]:
    """Name the statistics that a checkpoint lacks.

    Args:
        saved: the ones that it has, by their names in it without that of the weight.
        quant_type: that of the weight which they are for, in case the checkpoint does not say.
    """
    names = ["absmax", "quant_map"]
    absmax = saved.get("absmax")
    if any(name.startswith("nested_") for name in saved) or (absmax is not None and absmax.dtype == torch.uint8):
        names += ["nested_absmax", "nested_quant_map"]
    missing = [name for name in names if name not in saved]
    if not any(name.startswith(_PACKED) for name in saved):
        missing.append(f"{_PACKED}{quant_type}")
    return missing
