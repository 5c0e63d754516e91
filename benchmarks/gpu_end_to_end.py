"""Time a whole language model of about 1 B parameters on a CUDA device, with our layers and optimizers and with bitsandbytes'.

    python benchmarks/gpu_end_to_end.py [--tokens 128] [--output results/NAME.json]

Decoding is one token at a time through a CUDA graph, greedily, with a cache; where a library's layers cannot be captured, without
a graph, and the result says so. Training is forward, backward and a step of 8-bit AdamW on bfloat16 weights. Weights are random.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import gpu_timing
import torch
from llama_shaped import Model, Shape, random_model
from torch import nn

LIBRARIES = {"ours": "bnb_core", "bitsandbytes": "bitsandbytes"}
#: Sequences and tokens of a training step.
BATCH, LENGTH = 4, 512


def four_bit(library: Any) -> Callable[[nn.Linear], nn.Module]:
    """Return what makes a layer NF4, with plain scales."""

    def replacement(linear: nn.Linear) -> nn.Module:
        layer = library.nn.Linear4bit(
            linear.in_features, linear.out_features, False, torch.bfloat16, compress_statistics=False, quant_type="nf4"
        )
        return _loaded(layer, linear.weight)

    return replacement


def eight_bit(threshold: float) -> Callable[[Any], Callable[[nn.Linear], nn.Module]]:
    """Return, for a library, what makes a layer int8."""

    def of(library: Any) -> Callable[[nn.Linear], nn.Module]:
        def replacement(linear: nn.Linear) -> nn.Module:
            layer = library.nn.Linear8bitLt(
                linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=threshold
            )
            return _loaded(layer, linear.weight)

        return replacement

    return of


def _loaded(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    layer.load_state_dict({"weight": weight.detach().cpu()})
    return layer.cuda()  # which quantizes it


FORMATS: Dict[str, Callable[[Any], Callable[[nn.Linear], nn.Module]]] = {
    "nf4": four_bit,
    "int8": eight_bit(0.0),
    "int8, threshold 6": eight_bit(6.0),
}


class Decoder:
    """Makes one token after another; each step reads and writes the same memory, so that it can be captured."""

    def __init__(self, model: Model) -> None:
        model.make_caches()
        self.model = model
        self.token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.step: Callable[[], None] = self._eager
        self.captured = False

    def _eager(self) -> None:
        logits = self.model(self.token, self.position)
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)

    def capture(self) -> None:
        """Put the step into a CUDA graph, if it can be."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._eager()
        except RuntimeError as error:
            print(f"not captured: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
            return
        self.step, self.captured = graph.replay, True

    def start(self) -> None:
        """Go back to the first position."""
        self.token.fill_(1)
        self.position.zero_()


@torch.no_grad()
def decode(model: Model, tokens: int) -> Dict[str, Any]:
    """Time decoding, and return what was decoded too."""
    decoder = Decoder(model)
    for _ in range(3):
        decoder.step()
    decoder.capture()
    decoder.start()
    decoded: List[torch.Tensor] = []
    for _ in range(tokens):
        decoder.step()
        decoded.append(decoder.token.clone())
    best = float("inf")
    for _ in range(3):
        decoder.start()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(tokens):
            decoder.step()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return {
        "tokens_per_second": tokens / best,
        "captured": decoder.captured,
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "tokens": torch.cat(decoded).flatten().tolist(),
    }


def decoding(shape: Shape, tokens: int) -> List[Dict[str, Any]]:
    """Time each format with each library, and bfloat16."""
    rows = [{"format": "bfloat16", "library": "torch", **decode(random_model(shape), tokens)}]
    for name, make in FORMATS.items():
        for library, module in LIBRARIES.items():
            model = random_model(shape)
            model.replace_linears(make(importlib.import_module(module)))
            rows.append({"format": name, "library": library, **decode(model, tokens)})
            del model
            torch.cuda.empty_cache()
    for row in rows:
        print(
            f"decode {row['format']:18} {row['library']:13} {row['tokens_per_second']:8.1f} tokens/s"
            f"  {row['weights_bytes'] / 2**20:6.0f} MiB{'' if row['captured'] else '  without a graph'}"
        )
    return rows


def training(shape: Shape, steps: int) -> List[Dict[str, Any]]:
    """Time training steps with each library's AdamW8bit, and torch's AdamW."""
    rows = []
    tokens = torch.randint(shape.vocabulary, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1)).cuda()
    for library, module in {**LIBRARIES, "torch": None}.items():
        model = random_model(shape)
        cls = torch.optim.AdamW if module is None else importlib.import_module(module).optim.AdamW8bit
        optimizer = cls(model.parameters(), lr=1e-4, weight_decay=0.01)
        losses: List[float] = []
        elapsed = step = float("inf")
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            torch.cuda.synchronize()
            before = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            end = time.perf_counter()
            optimizer.zero_grad()
            losses.append(loss.item())
            elapsed, step = min(elapsed, end - start), min(step, end - before)
        state_bytes = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
        name = "AdamW" if module is None else "AdamW8bit"
        row = {"optimizer": name, "library": library, "milliseconds": elapsed * 1e3, "step_milliseconds": step * 1e3}
        rows.append({**row, "state_bytes": state_bytes, "losses": losses})
        print(
            f"train {name:9} {library:13} {elapsed * 1e3:7.1f} ms, of which the optimizer {step * 1e3:6.2f} ms;"
            f" states {state_bytes / 2**20:.0f} MiB; loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        )
        del model, optimizer, logits, loss
        torch.cuda.empty_cache()
    return rows


def main(arguments: Optional[List[str]] = None) -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode")
    parser.add_argument("--steps", type=int, default=10, help="training steps")
    parser.add_argument("--layers", type=int, default=Shape().layers)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each call that it casts
    shape = Shape(layers=options.layers)
    results = {
        "machine": gpu_timing.machine(),
        "shape": shape._asdict(),
        "training": training(shape, options.steps),
        "decoding": decoding(shape, options.tokens),  # last: a capture that fails leaves torch's generator behind it
    }
    if options.output:
        for row in results["decoding"]:
            row["tokens"] = row["tokens"][:16]
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
