"""`QuantState`: what is needed besides the codes to dequantize a tensor."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Union

import torch

from bnb_core.errors import InvalidArgumentError
from bnb_core.ops import gemm_4bit
from bnb_core.ops.plain import ordinary_execution
from bnb_core.ops.repeated import Repeated
from bnb_core.ops.spec import Nested
from bnb_core.ops.structured import structured_op
from bnb_core.quantization.checkpoint import KEYS, PACKED_PREFIX, dtype_name, pack_dict_to_tensor, read_entries


class QuantState:
    """The block scales, codebook and shape of a quantized tensor.

    Args:
        absmax: float32 [blocks], the largest magnitude in each block; or their uint8 codes, if nested.
        shape: shape of the tensor before quantization; None where the codes have that shape.
        code: the codebook, float32 [16] or [256].
        blocksize: consecutive elements that share a scale.
        quant_type: name of the 4-bit codebook, such as "nf4"; None for 8-bit codes.
        dtype: dtype of the tensor before quantization, and of what dequantization returns.
        offset: float32 [], added to the scales after they are dequantized. Only if nested.
        state2: the scales' own scales, which makes the statistics nested ("double quantization"; QLoRA, arXiv 2305.14314).

    Attributes:
        nested: whether `absmax` is quantized itself.
    """

    #: The types and keys that bitsandbytes itself reads and writes.
    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = (f"{PACKED_PREFIX}fp4", f"{PACKED_PREFIX}nf4")
    valid_qs_keys = (*KEYS, "quant_state")

    #: Finds the next product to be like the last one.
    _product: Optional[Repeated] = None

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: Optional[torch.Size] = None,
        code: Optional[torch.Tensor] = None,
        blocksize: Optional[int] = None,
        quant_type: Optional[str] = None,
        dtype: Optional[torch.dtype] = None,
        offset: Optional[torch.Tensor] = None,
        state2: Optional["QuantState"] = None,
    ) -> None:
        self.absmax = absmax
        self.shape: Any = shape
        self.code: Any = code
        self.dtype: Any = dtype
        self.blocksize: Any = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2: Any = state2
        self.nested = state2 is not None

    @property
    def nested_statistics(self) -> Optional[Nested]:
        """The scales' own scales as ops take them; None if the scales are not quantized."""
        if not self.nested:
            return None
        offset, second = self.offset, self.state2
        if offset is None:
            raise InvalidArgumentError("QuantState: offset is None although the statistics are nested; set it to a float32 scalar")
        # Each product asks for this, and a cast costs it a microsecond even where there is nothing to do.
        if offset.dtype != torch.float32:
            offset = offset.to(torch.float32)
        return Nested(second.absmax, second.code, offset, second.blocksize)

    def multiply(self, x: torch.Tensor, packed: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Return x W^T + bias, where W is the matrix that this is the state of.

        Args:
            x: float32, float16 or bfloat16 [..., K].
            packed: the 4-bit codes of W [N, K], as bytes.
            bias: [N] in x's dtype.

        Raises:
            InvalidArgumentError: a dtype, shape or device that is not accepted.
        """
        N, K = self.shape
        weight = (packed, self.absmax, self.code, self.blocksize, N, K, bias, self.nested_statistics)
        if torch.is_grad_enabled() or not ordinary_execution():
            return gemm_4bit(x, *weight)
        if self._product is None:
            self._product = Repeated(structured_op("gemm_4bit"))
        result: torch.Tensor = self._product(x, *weight)
        return result

    def __repr__(self) -> str:
        nested = ", nested" if self.nested else ""
        shape = None if self.shape is None else list(self.shape)
        return f"QuantState({self.quant_type}, shape={shape}, {self.dtype}, blocksize={self.blocksize}{nested})"

    def __getattr__(self, name: str) -> Any:
        # Sharded checkpointing resolves the key "quant_state.bitsandbytes__nf4" attribute by attribute.
        if name.startswith(PACKED_PREFIX):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Union[int, slice]) -> Any:
        """Return an entry of the list that bitsandbytes had in place of this class before 0.41."""
        second = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, second, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        """Compare; tensors up to 1e-6 absolute plus 1e-5 relative, NaN equal to NaN, devices left aside."""
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and self.nested == other.nested
            and _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
            and self.state2 == other.state2
        )

    def __getstate__(self) -> Dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_product"}

    __hash__ = None  # type: ignore[assignment]  # equal up to rounding is no basis for a hash

    def to(self, device: Union[torch.device, str, int]) -> "QuantState":
        """Move to a device, in place, and return self."""
        self._product = None  # which keeps the tensors that it was called with
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.offset is not None:
            self.offset = self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def as_dict(self, packed: bool = False) -> Dict[str, Any]:
        """Return the entries that a checkpoint has.

        Args:
            packed: only tensors, as safetensors needs them: the other entries become JSON, as bytes in a uint8 tensor. An 8-bit
                state has no such form and stays as it is.

        Raises:
            InvalidArgumentError: an attribute that a checkpoint needs is None.
        """
        for name in ("code", "blocksize", "dtype"):
            if getattr(self, name) is None:
                raise InvalidArgumentError(f"QuantState.as_dict: {name} is None; set it before saving")
        entries: Dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        nested = self.nested_statistics
        if nested is not None:
            entries["nested_absmax"] = nested.absmax
            entries["nested_blocksize"] = nested.blocksize
            # A copy: one codebook may serve many tensors, and safetensors refuses tensors that share memory.
            entries["nested_quant_map"] = nested.codebook.clone()
            entries["nested_dtype"] = dtype_name(self.state2.dtype or torch.float32)
            entries["nested_offset"] = nested.offset.item()
        if not packed or self.quant_type is None:
            return entries
        tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
        others = {key: value for key, value in entries.items() if key not in tensors}
        tensors[f"quant_state.{PACKED_PREFIX}{self.quant_type}"] = pack_dict_to_tensor(others)
        return tensors

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: Union[torch.device, str, int]) -> "QuantState":
        """Build a state from the entries of a checkpoint, packed or not, in the format of bitsandbytes.

        Everything is checked against everything else before it is used: a checkpoint is not trusted.

        Args:
            qs_dict: what `as_dict` returned. Keys may have dotted prefixes. It is left as it is.
            device: where to put the tensors.

        Raises:
            CheckpointError: an entry is missing, unknown or given twice, has a wrong dtype, or does not fit the others.
        """
        entries = read_entries(qs_dict)
        offset, state2 = None, None
        if "nested_absmax" in entries:
            offset = torch.tensor(entries["nested_offset"], dtype=torch.float32, device=device)
            state2 = cls(
                absmax=entries["nested_absmax"].to(device),
                code=entries["nested_quant_map"].to(device),
                blocksize=entries["nested_blocksize"],
                dtype=entries["nested_dtype"],
            )
        return cls(
            absmax=entries["absmax"].to(device),
            shape=entries["shape"],
            code=entries["quant_map"].to(device),
            blocksize=entries["blocksize"],
            quant_type=entries["quant_type"],
            dtype=entries["dtype"],
            offset=offset,
            state2=state2,
        )


def _close(a: Optional[torch.Tensor], b: Optional[torch.Tensor]) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.cpu(), b.cpu()
    return torch.allclose(a, b, atol=1e-6, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)
