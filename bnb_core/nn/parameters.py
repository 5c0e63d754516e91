"""Parameters that quantize themselves when they move to a device, and carry what their data stand for: `Params4bit`, `Int8Params`.

Their attributes are the contract with other libraries, which rebuild a parameter by `Params4bit(data, **old.__dict__)`.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, Optional, Tuple, TypeVar, Union

import torch

from bnb_core.errors import CheckpointError
from bnb_core.ops import int8_quantize_rows
from bnb_core.ops.plain import REGISTERED, add_plain_type, is_compiling
from bnb_core.quantization.four_bit import quantize_4bit
from bnb_core.quantization.state import QuantState

if TYPE_CHECKING:
    from bnb_core.nn.module4bit import Module4bit

_Self = TypeVar("_Self", bound="QuantizedParameter")

# Reading an attribute of a tensor whose class has a `__torch_function__` takes a microsecond, but not within this.
_TorchFunctionOff: Any = getattr(torch._C, "DisableTorchFunctionSubclass", None) or torch._C.DisableTorchFunction
_get_data: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_set_data: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack if REGISTERED else lambda: 0

#: Casts of floating-point values, which packed codes that are stored as such are not.
_CASTS = frozenset((torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float, torch.Tensor.double))
_PARTITIONS = frozenset((torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split))


def plain_data(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter's data as an ordinary tensor that shares its memory."""
    with _TorchFunctionOff():
        if is_compiling():
            return tensor.detach()  # the compiler takes `_get_data` for the property of the classes here, and would never return
        if _dispatch_modes():
            with torch._C._DisableTorchDispatch():  # tracers refuse classes that they do not know
                return _get_data(tensor)
        return _get_data(tensor)


def map_quant_state(state: QuantState, function: Callable[[torch.Tensor], torch.Tensor]) -> QuantState:
    """Return a copy of the state with `function` applied to each of its tensors."""
    return QuantState(
        absmax=function(state.absmax),
        shape=state.shape,
        code=None if state.code is None else function(state.code),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=None if state.offset is None else function(state.offset),
        state2=None if state.state2 is None else map_quant_state(state.state2, function),
    )


class QuantizedParameter(torch.nn.Parameter):
    """What the parameter classes share: moving, copying and pickling data together with the attributes that describe them."""

    def _is_quantized(self) -> bool:
        raise NotImplementedError

    def _quantizes(self) -> bool:
        """Say whether floating-point data are quantized as soon as a device is given."""
        raise NotImplementedError

    def _quantize(self, device: torch.device, dtype: Optional[torch.dtype]) -> None:
        """Replace the data by their codes on that device; `dtype` is what the codes stand for, None for that of the data."""
        raise NotImplementedError

    def _moved(self: _Self, move: Callable[[torch.Tensor], torch.Tensor]) -> _Self:
        """Return a copy of a quantized parameter, made by `move` from each of its tensors."""
        raise NotImplementedError

    def _like(self: _Self, data: torch.Tensor, **changes: Any) -> _Self:
        """Return a parameter of these data and the same attributes, but for the changes."""
        return type(self)(data, **{"requires_grad": self.requires_grad, **self.__dict__, **changes})

    # Modules in general move a parameter by `parameter.data = parameter.to(device)`: what describes the new data comes with them.
    @property
    def data(self) -> torch.Tensor:
        """The data as an ordinary tensor that shares its memory."""
        return plain_data(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _set_data(self, value)
        if value is not self and isinstance(value, type(self)):
            self.__setstate__({name: entry for name, entry in value.__getstate__().items() if name != "module"})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, and quantize if that has not been done: in place then, as bitsandbytes has it.

        Takes what `torch.Tensor.to` takes. A dtype converts floating-point values; codes, in whatever dtype they are stored, keep
        theirs.
        """
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if self._is_quantized():
            if device is None or device == self.device:
                return self
            return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if self._quantizes() and device is not None and device.type != "meta":
            self._quantize(device, dtype)
            return self
        if self.requires_grad and torch.is_grad_enabled():
            return super().to(*args, **kwargs)  # an ordinary tensor, through which gradients flow
        data = self.data
        moved = data.to(device=device, dtype=dtype, non_blocking=non_blocking, memory_format=memory_format)
        return self if moved is data else self._like(moved)

    def cpu(self) -> Any:  # type: ignore[override]
        """Move to the CPU, as `to` does."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """Move to a CUDA device, the current one by default, as `to` does."""
        return self.to(_device("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> Any:  # type: ignore[override]
        """Move to an XPU device, the current one by default, as `to` does."""
        return self.to(_device("xpu", device), non_blocking=non_blocking)

    def __deepcopy__(self: _Self, memo: Dict[int, Any]) -> _Self:
        if id(self) not in memo:
            result = memo[id(self)] = type(self)(self.data.clone(), requires_grad=self.requires_grad)
            result.__setstate__(
                {
                    # A module only if it is being copied too: the copy of a parameter alone belongs to none.
                    name: memo.get(id(value)) if isinstance(value, torch.nn.Module) else copy.deepcopy(value, memo)
                    for name, value in self.__getstate__().items()
                }
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Tuple[Any, ...]:
        # The attributes are the state, not arguments: they lead to the module, and from there back to this parameter.
        return _rebuild, (type(self), self.data, self.requires_grad), self.__getstate__()

    def __getstate__(self) -> Dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)


def _device(kind: str, device: Any) -> torch.device:
    return torch.device(kind, device) if isinstance(device, int) else torch.device(device or kind)


def _rebuild(cls: Any, data: torch.Tensor, requires_grad: bool) -> Any:
    return cls(data, requires_grad=requires_grad)


def _proxy(*path: str) -> Any:
    """Return a property that reads an attribute of the quantization state, as sharded checkpointing does by its name."""

    def read(self: "Params4bit") -> Any:
        value: Any = self.__dict__.get("quant_state")
        for name in path:
            if value is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {path[-1]!r} before it is quantized")
            value = getattr(value, name)
        return value

    return property(read)


@add_plain_type
class Params4bit(QuantizedParameter):
    """A weight that is quantized to 4 bits when it first moves to a device (QLoRA, arXiv 2305.14314).

    Args:
        data: floating-point values of any shape; or, if `bnb_quantized`, their packed codes.
        requires_grad: False, once quantized; codes have no gradient.
        quant_state: what belongs to packed codes.
        blocksize: consecutive elements that share a scale: a power of two from 32 to 4096; None for 64.
        compress_statistics: quantize the scales too ("double quantization").
        quant_type: "nf4", "fp4", or the name of another codebook of 16 values.
        quant_storage: dtype that the packed bytes are stored as; a floating-point one lets them be sharded with other parameters.
        module: a module whose `quant_state` is to be set when the weight is quantized.
        bnb_quantized: the data are packed codes.
        kwargs: further attributes, such as other libraries put on a parameter.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: Optional[QuantState]
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Optional["Module4bit"]

    def __new__(
        cls,
        data: Optional[torch.Tensor] = None,
        requires_grad: bool = False,
        quant_state: Optional[QuantState] = None,
        blocksize: Optional[int] = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Optional["Module4bit"] = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> "Params4bit":
        """Make the parameter."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.__dict__.update(
            kwargs,
            blocksize=64 if blocksize is None else blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_state=quant_state,
            quant_storage=quant_storage,
            bnb_quantized=bnb_quantized,
            module=module,
        )
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: Union[torch.device, str, int] = "cuda",
        module: Optional["Module4bit"] = None,
        **kwargs: Any,
    ) -> "Params4bit":
        """Build a parameter from the tensors of a checkpoint.

        Args:
            data: packed codes, in any dtype; their dtype becomes `quant_storage`.
            quantized_stats: the other tensors, as `QuantState.from_dict` takes them.
            requires_grad: only a floating-point `quant_storage` can have it; there is no gradient.
            device: where to put all of it.
            module: a module whose `quant_state` is to be set.
            kwargs: further attributes; where they are among the parameter's own, the checkpoint says otherwise and is right.

        Raises:
            CheckpointError: the statistics are not complete, or do not fit each other or the data.
        """
        state = QuantState.from_dict(quantized_stats, device=device)
        shape = list(state.shape or ())
        stored, needed = data.numel() * data.element_size(), (math.prod(shape) + 1) // 2
        if stored != needed:
            raise CheckpointError(
                f"the packed weight has {stored} bytes, but its statistics are of shape {shape}, which takes {needed}; "
                "both must come from one checkpoint"
            )
        described = {
            "quant_state": state,
            "blocksize": state.blocksize,
            "compress_statistics": state.nested,
            "quant_type": state.quant_type,
            "quant_storage": data.dtype,
            "bnb_quantized": True,
            "module": module,
        }
        if module is not None:
            module.quant_state = state
            module.quant_storage = data.dtype
        return cls(data.to(device), requires_grad=requires_grad, **{**kwargs, **described})

    def _is_quantized(self) -> bool:
        return self.bnb_quantized

    def _quantizes(self) -> bool:
        return True

    def _quantize(self, device: torch.device, dtype: Optional[torch.dtype]) -> None:
        packed, state = quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if dtype is not None:
            state.dtype = dtype
        self.requires_grad_(False)
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Params4bit":
        state = None if self.quant_state is None else map_quant_state(self.quant_state, move)
        return self._like(move(self.data), quant_state=state, module=None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS and args[0].bnb_quantized:
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in _PARTITIONS:
            whole = next(iter(args or kwargs.values()))
            return tuple(whole._like(part) for part in result)
        return result

    absmax = _proxy("absmax")
    code = _proxy("code")
    quant_map = _proxy("code")
    offset = _proxy("offset")
    state2 = _proxy("state2")
    nested_absmax = _proxy("state2", "absmax")
    nested_blocksize = _proxy("state2", "blocksize")
    nested_quant_map = _proxy("state2", "code")
    nested_dtype = _proxy("state2", "dtype")
    nested_offset = _proxy("offset")


@add_plain_type
class Int8Params(QuantizedParameter):
    """A weight of which rows are quantized to int8 when it first moves to a device (LLM.int8, arXiv 2208.07339).

    Args:
        data: floating-point values [N, K], or int8 codes.
        requires_grad: only floating-point values can have a gradient.
        has_fp16_weights: keep the floating-point values; they are quantized for each product instead.
        CB: the codes: None, or the data themselves.
        SCB: float32 [N], the largest magnitude in each row.
        kwargs: further attributes, such as other libraries put on a parameter.
    """

    CB: Optional[torch.Tensor]
    SCB: Optional[torch.Tensor]
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Optional[torch.Tensor] = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Optional[torch.Tensor] = None,
        SCB: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> "Int8Params":
        """Make the parameter."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        # Old codes must not outlive their parameter when another is built from its attributes.
        codes = None if CB is None or not self._is_quantized() else self.data
        self.__dict__.update(kwargs, CB=codes, SCB=SCB, has_fp16_weights=has_fp16_weights)
        return self

    def _is_quantized(self) -> bool:
        return self.dtype == torch.int8

    def _quantizes(self) -> bool:
        return not self.has_fp16_weights

    def _quantize(self, device: torch.device, dtype: Optional[torch.dtype]) -> None:
        # The dtype is noted nowhere: products take the input's, and dequantized weights are float32.
        codes, absmax, _ = int8_quantize_rows(self.data.to(device))
        self.requires_grad_(False)
        self.data = self.CB = codes
        self.SCB = absmax

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Int8Params":
        codes = move(self.data)
        return self._like(codes, CB=codes, SCB=None if self.SCB is None else move(self.SCB))

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "CB": self.CB is not None}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__({**state, "CB": self.data if state["CB"] else None})
