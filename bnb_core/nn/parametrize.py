"""4-bit storage for any parameter of any module, such as convolution weights or 3-D experts: `replace_parameter_4bit`.

The parameter keeps its name, and the module's code stays as it is: whoever reads the attribute gets the dequantized values. In a
forward of the module they are dequantized once, and let go of at its end.
"""

from __future__ import annotations

import functools
import inspect
from threading import get_ident
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
from torch.nn.utils import parametrize

from bnb_core.errors import CheckpointError, MissingParameterError, ParameterTypeError
from bnb_core.nn.module4bit import missing_statistics
from bnb_core.nn.parameters import Params4bit, map_quant_state
from bnb_core.nn.quantized_module import cast_dtype, move_bytes
from bnb_core.ops.checks import FLOAT_DTYPES
from bnb_core.ops.plain import ordinary_execution
from bnb_core.quantization.four_bit import dequantize_4bit, quantize_4bit
from bnb_core.quantization.layout import as_bytes
from bnb_core.quantization.state import QuantState

# Older torch calls no hook after a forward that raised, which would leave the values in memory for good: none are kept there.
_CAN_KEEP = "always_call" in inspect.signature(torch.nn.Module.register_forward_hook).parameters


class Bnb4bitParametrization(torch.nn.Module):
    """Dequantize a parameter that is stored as packed 4-bit codes, for `torch.nn.utils.parametrize`.

    Args:
        quant_state: the statistics that belong to the codes.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state
        #: What is read; the statistics' dtype is the same, but for dtypes that nothing is quantized from.
        self.dtype: torch.dtype = quant_state.dtype
        # By thread: how many forwards of the module it is in, one within the other, and what it has dequantized in them.
        self._forwards: Dict[int, int] = {}
        self._kept: Dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """Return the values, of the shape that `quant_state` has, and in the dtype that the module has been cast to.

        Args:
            quantized_param: packed codes, uint8 [(n + 1) // 2, 1].
        """
        if not ordinary_execution():
            return self._dequantize(quantized_param)
        thread = get_ident()
        values = self._kept.get(thread)
        if values is None:
            values = self._dequantize(quantized_param)
            if thread in self._forwards:
                self._kept[thread] = values
        return values

    def _dequantize(self, packed: torch.Tensor) -> torch.Tensor:
        return dequantize_4bit(as_bytes(packed), self.quant_state).to(self.dtype)

    def _enter(self) -> None:
        thread = get_ident()
        self._forwards[thread] = self._forwards.get(thread, 0) + 1

    def _leave(self) -> None:
        thread = get_ident()
        outer = self._forwards.pop(thread, 0) - 1
        if outer > 0:
            self._forwards[thread] = outer
        else:
            self._kept.pop(thread, None)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)
        state = self.quant_state
        with torch.no_grad():
            self.quant_state = map_quant_state(state, lambda tensor: move_bytes(fn, tensor))
            self.dtype = cast_dtype(fn, self.dtype, state.absmax.device)
        if self.dtype in FLOAT_DTYPES:
            self.quant_state.dtype = self.dtype
        return self


def replace_parameter_4bit(
    module: torch.nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: Optional[int] = None,
) -> None:
    """Quantize a parameter of a module to 4 bits, where it is.

    Reading the attribute then dequantizes it, into the dtype that the parameter had, or that the module has been cast to since. It
    has no gradient. State dicts have the entries that those of `Linear4bit` have, under the parameter's name, and are loaded
    strictly; floating-point values that are loaded are quantized.

    From torch 2.1 on, values that are read several times in one forward of `module` are dequantized once.

    Args:
        module: any module.
        param_name: name of one of its own parameters: float32, float16 or bfloat16 of any shape.
        compress_statistics: quantize the block scales too ("double quantization").
        quant_type: "nf4", "fp4", or the name of another codebook of 16 values.
        blocksize: consecutive elements that share a scale: a power of two from 32 to 4096; by default 64.

    Raises:
        MissingParameterError: the module has no attribute of that name.
        ParameterTypeError: the attribute is not a parameter, or is quantized already.
        InvalidArgumentError: a dtype, quant type or blocksize that is not accepted.
    """
    values = _parameter(module, param_name).data
    packed, state = quantize_4bit(values, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type)
    _install(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: torch.nn.Module,
    param_name: str,
    qs_dict: Mapping[str, Any],
    device: Union[torch.device, str, int],
) -> None:
    """Declare that a parameter of a module is packed 4-bit codes; what reading it gives is as in `replace_parameter_4bit`.

    Args:
        module: any module.
        param_name: name of one of its own parameters: packed codes in any dtype.
        qs_dict: the statistics that belong to them, as `QuantState.as_dict` returns them.
        device: where to put codes and statistics.

    Raises:
        MissingParameterError: the module has no attribute of that name.
        ParameterTypeError: the attribute is not a parameter, or is declared already.
        CheckpointError: the statistics are not complete, or do not fit each other or the codes.
    """
    stored = Params4bit.from_prequantized(_parameter(module, param_name).data, qs_dict, device=device)
    assert stored.quant_state is not None
    _install(module, param_name, stored.data, stored.quant_state)


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter:
    if not hasattr(module, name):
        names = ", ".join(own for own, _ in module.named_parameters(recurse=False)) or "none"
        raise MissingParameterError(
            f"{type(module).__name__}: Module does not have parameter {name!r}; it has {names}. "
            "Pass the submodule that the parameter belongs to"
        )
    parameter = getattr(module, name)
    if not isinstance(parameter, torch.nn.Parameter):
        hint = "it is parametrized already" if parametrize.is_parametrized(module, name) else f"it is a {type(parameter).__name__}"
        raise ParameterTypeError(f"{type(module).__name__}: Parameter {name!r} is not an instance of nn.Parameter; {hint}")
    return parameter


def _install(module: torch.nn.Module, name: str, packed: torch.Tensor, state: QuantState) -> None:
    # Bytes, whatever dtype they came in: casting the module would change codes that are stored as floating-point numbers.
    setattr(module, name, torch.nn.Parameter(as_bytes(packed).view(-1, 1), requires_grad=False))
    parametrization = Bnb4bitParametrization(state)
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    # The hooks find the parametrization by name, so that copies of the module use their own.
    module._register_state_dict_hook(functools.partial(_save, name=name))
    module._register_load_state_dict_pre_hook(functools.partial(_load, name=name), with_module=True)
    if _CAN_KEEP:
        module.register_forward_pre_hook(functools.partial(_enter, name=name))
        module.register_forward_hook(functools.partial(_leave, name=name), always_call=True)


def _find(module: torch.nn.Module, name: str) -> Optional[Bnb4bitParametrization]:
    """Return the parametrization; None where it has been removed since."""
    if not parametrize.is_parametrized(module, name):
        return None
    return next((item for item in _codes(module, name) if isinstance(item, Bnb4bitParametrization)), None)


def _codes(module: torch.nn.Module, name: str) -> Any:
    """Return torch's list of what is done to a parameter; its `original` are the codes."""
    lists: Any = module.parametrizations
    return lists[name]


def _enter(module: torch.nn.Module, args: Any, *, name: str) -> None:
    parametrization = _find(module, name) if ordinary_execution() else None
    if parametrization is not None:
        parametrization._enter()


def _leave(module: torch.nn.Module, args: Any, result: Any, *, name: str) -> None:
    parametrization = _find(module, name) if ordinary_execution() else None
    if parametrization is not None:
        parametrization._leave()


def _save(module: torch.nn.Module, state_dict: Dict[str, Any], prefix: str, local_metadata: Any, *, name: str) -> None:
    """Give codes and statistics the names that they have in the state dict of a quantized module."""
    parametrization = _find(module, name)
    packed = state_dict.pop(_original(prefix, name), None)
    if parametrization is not None and packed is not None:
        state_dict[prefix + name] = packed
        for entry, value in parametrization.quant_state.as_dict(packed=True).items():
            state_dict[f"{prefix}{name}.{entry}"] = value


def _load(
    module: torch.nn.Module,
    state_dict: Dict[str, Any],
    prefix: str,
    local_metadata: Dict[str, Any],
    strict: bool,
    missing: List[str],
    unexpected: List[str],
    errors: List[str],
    *,
    name: str,
) -> None:
    """Take the statistics out of a state dict, and name the codes as torch will look for them."""
    parametrization, key = _find(module, name), prefix + name
    source = state_dict.get(key)
    if parametrization is None or not isinstance(source, torch.Tensor):
        return
    del state_dict[key]
    saved = {entry[len(key) + 1 :]: state_dict.pop(entry) for entry in list(state_dict) if entry.startswith(f"{key}.")}
    codes = _codes(module, name)
    assign = local_metadata.get("assign_to_params_buffers", False)
    device = source.device if assign or codes.original.is_meta else codes.original.device
    former: Any = parametrization.quant_state
    state: Any
    state_dict[_original(prefix, name)] = codes.original  # where nothing is loaded, what there is stays
    if not saved and source.shape == former.shape:
        packed, state = quantize_4bit(source.to(device), None, None, former.blocksize, former.nested, former.quant_type)
    elif not saved and source.numel() * source.element_size() != codes.original.numel():
        errors.append(_size_mismatch(key, source.shape, former.shape))
        return
    else:
        lacking = missing_statistics(saved, former.quant_type)
        if lacking:
            missing.extend(f"{key}.{entry}" for entry in lacking)
            return
        try:
            stored = Params4bit.from_prequantized(source, saved, device=device)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from error
        packed, state = stored.data, stored.quant_state
        if state.shape != former.shape:
            errors.append(_size_mismatch(key, state.shape, former.shape))
            return
        if not assign:
            state = map_quant_state(state, torch.clone)
    if assign:
        parametrization.dtype = state.dtype
    else:
        state.dtype = former.dtype
    parametrization.quant_state = state
    packed = as_bytes(packed).view(-1, 1)
    if codes.original.is_meta and not assign:
        codes.original = torch.nn.Parameter(packed.clone(), requires_grad=False)
    state_dict[_original(prefix, name)] = packed


def _original(prefix: str, name: str) -> str:
    """Return the name that torch gives the codes in a state dict."""
    return f"{prefix}parametrizations.{name}.original"


def _size_mismatch(key: str, found: Sequence[int], expected: Sequence[int]) -> str:
    return f"size mismatch for {key}: the checkpoint's is of shape {list(found)}, the module's of shape {list(expected)}."
