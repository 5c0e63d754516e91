"""Decide from a checkpoint's names which of its tensors are weights of linear layers, as transformers decides from modules."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Set

from bnb_core.integrations.model import matches
from bnb_core.integrations.safetensors_file import Entry

#: Output layers, which transformers leaves alone. A tied one is not in the checkpoint, but transformers still has to be told.
OUTPUT_LAYERS = (
    *("lm_head", "embed_out", "cls", "predictions", "lm_predictions", "generator_lm_head", "pred_layer", "vocab_projector"),
    *("output_projection", "proj_out", "classifier", "score", "qa_outputs"),
)
#: Parts of the names of embeddings, and the names of those that have none of them.
_EMBEDDING = ("emb",)
_EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
#: By part of the model's type: layers that transformers keeps in floating point.
_KEPT = {"t5": ("wo",), "switch_transformers": ("wo",), "blip": ("qformer",)}
#: By the model's type: layers whose weight is stored transposed, as [K, N].
_TRANSPOSED_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TRANSPOSED_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
_QUANTIZABLE = ("F32", "F16", "BF16")


class LayerNames(NamedTuple):
    """The linear layers of a checkpoint.

    Attributes:
        quantized: names of layers to quantize.
        transposed: those among them whose weight is stored as [K, N].
        skipped: names of other matrices, with the reason.
        told: names that transformers has to be told to leave alone; then it leaves alone all that is not in `quantized`.
    """

    quantized: Set[str]
    transposed: Set[str]
    skipped: Dict[str, str]
    told: List[str]


def find_layers(entries: Mapping[str, Entry], config: Mapping[str, Any], skip: Sequence[str]) -> LayerNames:
    """Sort the matrices of a checkpoint.

    Args:
        entries: its tensors by name.
        config: its config.json.
        skip: names of layers to leave alone, as in `quantize_model`.
    """
    model_type = str(config.get("model_type", ""))
    kept = [name for part, names in _KEPT.items() if part in model_type for name in names]
    skipped: Dict[str, str] = {}
    chosen: Set[str] = set()
    for key, entry in entries.items():
        name, _, parameter = key.rpartition(".")
        if parameter != "weight" or len(entry.shape) != 2:
            continue
        reason = _why_not(name, entry, kept, skip)
        if reason is None:
            chosen.add(name)
        else:
            skipped[name] = reason
    told = {*OUTPUT_LAYERS, *kept, *skipped}
    # What transformers is told to leave alone, it takes for the start, the end or a part of other names too.
    found: Sequence[str] = tuple(told)
    while found:
        found = tuple(name for name in chosen if _is_left_alone(name, tuple(told)))
        for name in found:
            skipped[name] = "transformers takes it for a part of a layer that is skipped"
        chosen.difference_update(found)
        told.update(found)
    transposed = {name for name in chosen if model_type in _TRANSPOSED_TYPES and _leaf(name) in _TRANSPOSED_LAYERS}
    return LayerNames(chosen, transposed, dict(sorted(skipped.items())), sorted(told))


def _why_not(name: str, entry: Entry, kept: Iterable[str], skip: Sequence[str]) -> Any:
    leaf = _leaf(name)
    pattern = matches(name, skip)
    if pattern is not None:
        return f"skip has {pattern!r}"
    if leaf in _EMBEDDINGS or any(part in leaf for part in _EMBEDDING):
        return "it is an embedding"
    if matches(name, OUTPUT_LAYERS) is not None:
        return "it is an output layer"
    if matches(name, tuple(kept)) is not None:
        return "transformers keeps it in floating point"
    if entry.dtype not in _QUANTIZABLE:
        return f"it is {entry.dtype}; only F32, F16 and BF16 are quantized"
    return None


def _is_left_alone(name: str, told: Sequence[str]) -> bool:
    """Say whether transformers, of version 4 or 5, leaves a layer alone when it is told these names."""
    told = tuple(told)
    return name.startswith(told) or name.endswith(told) or any(f"{key}." in name for key in told)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
