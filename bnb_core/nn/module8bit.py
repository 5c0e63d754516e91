"""What modules with an int8 weight share: the scales of its rows, and how checkpoints have them."""

from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, List, Optional, Set

import torch

from bnb_core.errors import CheckpointError
from bnb_core.nn.parameters import Int8Params
from bnb_core.nn.quantized_module import QuantizedModule
from bnb_core.ops.sharded import is_sharded
from bnb_core.quantization.products import MatmulLtState

#: The layouts of int8 weights by the number that checkpoints have for each; since bitsandbytes 0.46 there is only "row".
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


class ModuleState(MatmulLtState):
    """The state of a module, of which `CB` is the codes that its weight has now.

    They are looked up: a tensor kept here would stay in memory when the weight is offloaded or replaced. Those that `matmul` makes
    of a weight in floating point are kept.

    Args:
        module: has the weight.
        threshold, has_fp16_weights: as in `MatmulLtState`.
    """

    _module: Callable[[], "Optional[Module8bit]"] = staticmethod(lambda: None)

    def __init__(self, module: "Module8bit", threshold: float = 0.0, has_fp16_weights: bool = False) -> None:
        self.belong_to(module)
        super().__init__(threshold=threshold, has_fp16_weights=has_fp16_weights)

    def belong_to(self, module: "Module8bit") -> None:
        """Look codes up in this module from now on."""
        self._module = weakref.ref(module)

    @property
    def CB(self) -> Optional[torch.Tensor]:  # noqa: N802
        """The codes, int8 [rows, columns]; None where there are none. To set them sets the weight's, if that is quantized."""
        weight = self._quantized_weight()
        return self._codes if weight is None else weight.data

    @CB.setter
    def CB(self, codes: Optional[torch.Tensor]) -> None:  # noqa: N802
        weight = self._quantized_weight()
        self._codes = codes if weight is None else None
        if weight is not None and codes is not None:
            weight.data = codes

    def _quantized_weight(self) -> Optional[torch.Tensor]:
        module = self._module()
        weight = None if module is None else module._parameters.get("weight")
        return weight if weight is not None and weight.dtype == torch.int8 else None

    def __getstate__(self) -> Dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_module"}


class Module8bit(QuantizedModule):
    """A module of which `weight` is an `Int8Params`, and `state.SCB` the largest magnitude in each of its rows."""

    state: "ModuleState"

    def __setstate__(self, state: Dict[str, Any]) -> None:  # of copies and pickles
        super().__setstate__(state)
        self.state.belong_to(self)

    # ---------------------------------------------------------------------------------------------------------------- statistics

    def _statistics(self, weight: Any) -> Optional[torch.Tensor]:
        if weight.dtype != torch.int8:
            return None
        absmax = getattr(weight, "SCB", None)
        return self.state.SCB if absmax is None else absmax

    def _keep_statistics(self, statistics: torch.Tensor) -> None:
        weight, state = self.weight, self.state
        state.SCB = statistics
        if isinstance(weight, Int8Params):
            weight.SCB = None if weight.SCB is None else statistics
            weight.CB = None if weight.CB is None else weight.data

    def _map_statistics(self, statistics: torch.Tensor, move: Any) -> torch.Tensor:
        return move(statistics)

    def _adopt(self, weight: torch.Tensor) -> None:
        if isinstance(weight, Int8Params):
            self.state.SCB = weight.SCB

    # --------------------------------------------------------------------------------------------------------------- checkpoints

    @property
    def SCB(self) -> Optional[torch.Tensor]:  # noqa: N802
        """The largest magnitude in each row of a quantized weight: an entry of checkpoints, by its name there."""
        return self._statistics(self.weight)

    @property
    def weight_format(self) -> torch.Tensor:
        """What checkpoints say of the order of the codes: by rows."""
        return torch.tensor(LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"], dtype=torch.uint8)

    def _save_to_state_dict(self, destination: Dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        absmax = self._statistics(self.weight)
        if absmax is not None:
            destination[f"{prefix}SCB"] = absmax if keep_vars else absmax.detach()
            destination[f"{prefix}weight_format"] = self.weight_format

    def _load_weight(self, entries: Dict[str, Any], assign: bool, missing: List[str], errors: List[str]) -> Set[str]:
        source, weight = entries["weight"].data, self.weight
        done = {"weight_format"} & set(entries)
        _require_row_format(entries.get("weight_format", "row"))
        if source.dtype == torch.int8:
            done |= {"SCB"} & set(entries)
        if tuple(source.shape) != self._weight_shape():
            return done
        if source.dtype != torch.int8:
            quantized = self._statistics(self.weight) is not None
            if quantized and is_sharded(weight):
                raise CheckpointError(
                    f"the checkpoint has {source.dtype} values, and a sharded weight cannot be quantized; load it before sharding"
                )
            if not isinstance(weight, Int8Params) or not (assign or quantized):
                return done
            new = weight._like(source if assign else source.clone(), CB=None, SCB=None)
            self._replace_weight(new.to(weight.device) if quantized else new, assign)
            return {"weight", *done}
        if "SCB" not in done:
            missing.append("SCB")
            return {"weight", *done}
        absmax = self._checked_scales(entries["SCB"])
        if is_sharded(weight):
            self._keep_statistics(absmax.to(weight.device, copy=not assign))
            return done
        device = source.device if assign or weight.is_meta else weight.device
        codes, absmax = (tensor.to(device, copy=not assign) for tensor in (source, absmax))
        self._replace_weight(Int8Params(codes, requires_grad=False, CB=codes, SCB=absmax), assign)
        return {"weight", *done}

    def _checked_scales(self, absmax: Any) -> torch.Tensor:
        if self.state.has_fp16_weights:
            raise CheckpointError(
                "the checkpoint has int8 codes, but the module keeps its weight in floating point; "
                "construct it with has_fp16_weights=False"
            )
        rows, _ = self._weight_shape()
        if not isinstance(absmax, torch.Tensor) or absmax.dtype != torch.float32 or tuple(absmax.shape) != (rows,):
            found = f"{absmax.dtype} {list(absmax.shape)}" if isinstance(absmax, torch.Tensor) else f"a {type(absmax).__name__}"
            raise CheckpointError(f"SCB is {found}; it must be torch.float32 [{rows}]")
        return absmax


def maybe_rearrange_weight(
    state_dict: Dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: List[str],
    unexpected_keys: List[str],
    error_msgs: List[str],
) -> None:
    """Take the layout of an int8 weight out of a state dict that is about to be loaded: a load_state_dict pre-hook of bitsandbytes.

    The modules of bnb_core see to this themselves.

    Args:
        state_dict: changed in place; left as it is where it has no weight.
        prefix: of the module's entries.
        local_metadata, strict, missing_keys, unexpected_keys, error_msgs: what torch calls such hooks with. Nothing of it is read.

    Raises:
        CheckpointError: the codes are not row-major.
    """
    if f"{prefix}weight" in state_dict:
        _require_row_format(state_dict.pop(f"{prefix}weight_format", "row"))


def _require_row_format(weight_format: Any) -> None:
    if isinstance(weight_format, torch.Tensor):
        weight_format = weight_format.tolist()
    if weight_format not in ("row", LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"]):
        raise CheckpointError(
            f"weight_format is {weight_format!r}; only row-major codes, 0 or 'row', can be loaded. Save the model again with "
            "bitsandbytes 0.45, which can still read the others"
        )
