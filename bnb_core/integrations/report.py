"""`QuantizationReport`: what quantizing a model did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple


class QuantizedLayer(NamedTuple):
    """A layer that was quantized; bytes are those of its weight with all its scales and codebooks."""

    name: str
    bytes_before: int
    bytes_after: int


@dataclass
class QuantizationReport:
    """Layers that were quantized, those that were not and why, and bytes. Print it.

    Attributes:
        format: "nf4", "fp4", "int8", …
        layers: what was quantized.
        skipped: by name of the layer that was not, why.
        bytes_before, bytes_after: of all parameters and buffers that a checkpoint of the model has.
    """

    format: str
    layers: List[QuantizedLayer] = field(default_factory=list)
    skipped: Dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def summary(self) -> str:
        """Return one line with the numbers."""
        before, after = sum(layer.bytes_before for layer in self.layers), sum(layer.bytes_after for layer in self.layers)
        return (
            f"{len(self.layers)} layers quantized to {self.format}, {len(self.skipped)} left alone: "
            f"{format_bytes(before)} -> {format_bytes(after)}; "
            f"the whole model: {format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        )

    def __str__(self) -> str:
        return "\n".join([self.summary(), *(f"  left alone: {name}: {reason}" for name, reason in self.skipped.items())])


def format_bytes(count: float) -> str:
    """Return a number of bytes as people read it, such as "1.5 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
