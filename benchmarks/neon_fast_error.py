"""Measure what the fast precision of bnb-cpu-neon costs on real weights: `python benchmarks/neon_fast_error.py`.

Embeds the demo's sentences with all-MiniLM-L6-v2, its linear layers quantized, in the exact and in the fast precision. Prints, and
stores in benchmarks/results, the relative Frobenius error of each layer's output for the same input, and the cosine similarity of
the embeddings. Needs bnb-core[demo] and bnb-cpu-neon; on x86-64 NEON is emulated, with the same results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import torch
from bnb_cpu_neon import engine, use_precision
from torch import nn

import bnb_core as bnb
from bnb_core.cli.demo.minilm import MiniLM
from bnb_core.cli.demo.sentences import QUERIES, SENTENCES


def layer_errors(model: nn.Module, inputs: Dict[str, torch.Tensor]) -> Dict[str, float]:
    """Return the relative error of each quantized layer by name, each given the input that it has in the exact model."""
    errors: Dict[str, float] = {}

    def compare(name: str, layer: Any, arguments: Any, exact: torch.Tensor) -> None:
        with use_precision("fast"):
            fast = layer.forward(*arguments)
        errors[name] = ((fast - exact).norm() / exact.norm()).item()

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            hooks.append(
                layer.register_forward_hook(lambda layer, arguments, exact, name=name: compare(name, layer, arguments, exact))
            )
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return errors


def measure(source: MiniLM, quant_type: str) -> Dict[str, Any]:
    """Return the figures for a quantization type, "nf4" or "fp4"."""
    inputs = source.prepare(SENTENCES + QUERIES)
    original = source.embed(source.load(), inputs).double()
    model = source.load()
    bnb.quantize_model(model, quant_type, double_quant=False)
    errors = layer_errors(model, inputs)
    exact = source.embed(model, inputs).double()
    with use_precision("fast"):
        fast = source.embed(model, inputs).double()

    def cosines(a: torch.Tensor, b: torch.Tensor) -> Dict[str, float]:
        each = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        return {"mean": each.mean().item(), "least": each.min().item()}

    return {
        "quant_type": quant_type,
        "layers": errors,
        "mean_of_layers": sum(errors.values()) / len(errors),
        "worst_of_layers": max(errors.values()),
        "cosine_fast_to_exact": cosines(fast, exact),
        "cosine_exact_to_float32_weights": cosines(exact, original),
        "cosine_fast_to_float32_weights": cosines(fast, original),
    }


def main() -> None:
    """Measure, print, and store."""
    bnb.backends.set_backend("neon")
    source = MiniLM.installed(torch.device("cpu"))
    rows: List[Dict[str, Any]] = []
    with torch.no_grad():
        for quant_type in ("nf4", "fp4"):
            row = measure(source, quant_type)
            rows.append(row)
            print(f"{quant_type}: error of {len(row['layers'])} layers {row['mean_of_layers']:.2%} on average, at most", end=" ")
            print(f"{row['worst_of_layers']:.2%}")
            for key in ("cosine_fast_to_exact", "cosine_exact_to_float32_weights", "cosine_fast_to_float32_weights"):
                print(f"  {key}: {row[key]['mean']:.6f} on average, at least {row[key]['least']:.6f}")
    conditions = {"model": source.name, "sentences": len(SENTENCES + QUERIES), "tier": engine.tier, "torch": torch.__version__}
    path = Path(__file__).parent / "results" / "neon_fast_error_minilm.json"
    path.write_text(json.dumps({**conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
