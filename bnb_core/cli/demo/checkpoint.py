"""Read a local transformers checkpoint, encoder or causal language model, for the demo's comparisons."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import textwrap
from pathlib import Path
from typing import Any, Iterator, Sequence, Union

import click
import torch
from torch import nn
from torch.nn import functional

from bnb_core.cli.demo.text import language_reference

#: Held-out text for a language model: windows of this many tokens, or of its own maximum if that is less.
WINDOW = 128
WINDOWS = 16
PROMPT = "The Python programming language is"
NEW_TOKENS = 40


class Checkpoint:
    """A folder that transformers can read, with nothing fetched from anywhere else."""

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        self.name = folder.resolve().name
        self.device = device
        self._folder = folder
        self._config = config
        with _explained(folder, "tokenizer"):
            self._tokenizer = _transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def _load(self, kind: str) -> nn.Module:
        with _explained(self._folder, "model"):
            model = getattr(_transformers(), kind).from_pretrained(
                str(self._folder), config=self._config, torch_dtype="auto", local_files_only=True
            )
        return model.eval()


class EncoderCheckpoint(Checkpoint):
    """An encoder, its last hidden states mean-pooled to one vector a sentence."""

    def load(self) -> nn.Module:
        """Return the model on the CPU, in the checkpoint's dtype."""
        return self._load("AutoModel")

    def prepare(self, sentences: Sequence[str]) -> Any:
        """Return the tokens of one batch, on the device."""
        return self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt").to(self.device)

    def embed(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """Return f32[sentences, width], of length 1 each."""
        hidden = model(**inputs).last_hidden_state.float()
        present = inputs["attention_mask"][..., None]
        return functional.normalize((hidden * present).sum(1) / present.sum(1), dim=-1)


class LanguageCheckpoint(Checkpoint):
    """A causal language model."""

    unit = "token"

    def load(self) -> nn.Module:
        """Return the model on the CPU, in the checkpoint's dtype."""
        return self._load("AutoModelForCausalLM")

    def held_out(self) -> torch.Tensor:
        """Return the tokens of some English text, i64[windows, length]."""
        tokens = self._tokenizer(language_reference().held_out, return_tensors="pt", verbose=False)["input_ids"][0]
        length = min(WINDOW, getattr(self._config, "max_position_embeddings", WINDOW), len(tokens))
        return tokens.unfold(0, length, length)[:WINDOWS]

    def loss(self, model: Any, windows: torch.Tensor) -> torch.Tensor:
        """Return the mean negative log-likelihood of a token, in nats."""
        logits = model(input_ids=windows).logits[:, :-1].float()
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def generate(self, model: Any) -> str:
        """Continue a prompt with the likeliest tokens."""
        inputs = self._tokenizer(PROMPT, return_tensors="pt").to(self.device)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return self._tokenizer.decode(tokens[0], skip_special_tokens=True)


def open_checkpoint(folder: Path, device: torch.device) -> Union[EncoderCheckpoint, LanguageCheckpoint]:
    """Return the checkpoint of a folder, as what its configuration says it is.

    Raises:
        click.ClickException: transformers is missing, or cannot read the folder, or it holds an encoder-decoder.
    """
    if importlib.util.find_spec("transformers") is None:
        raise click.ClickException("--model reads checkpoints with transformers, which is not installed; pip install transformers")
    if not (folder / "config.json").is_file():
        raise click.ClickException(
            f"{folder} has no config.json, so it is no transformers checkpoint; pass a folder that save_pretrained() wrote"
        )
    with _explained(folder, "configuration"):
        config = _transformers().AutoConfig.from_pretrained(str(folder), local_files_only=True)
    architectures = " ".join(config.architectures or ())
    if config.is_encoder_decoder:
        raise click.ClickException(
            f"{folder} holds an encoder-decoder ({architectures}); pass an encoder or a causal language model"
        )
    kind = LanguageCheckpoint if "ForCausalLM" in architectures or "LMHeadModel" in architectures else EncoderCheckpoint
    return kind(folder, config, device)


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def _explained(folder: Path, part: str) -> Iterator[None]:
    """Turn what transformers raises about a folder into one line."""
    try:
        yield
    except Exception as error:  # of many kinds, some of them of other libraries' own
        reason = textwrap.shorten(str(error), width=200, placeholder=" ...") or type(error).__name__
        raise click.ClickException(f"transformers cannot read the {part} in {folder}: {reason}") from error
