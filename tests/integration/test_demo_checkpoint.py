"""`bnb demo --model DIR`: checkpoints that transformers wrote, and folders that are none."""

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner

from bnb_core.cli import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

WORDS = [
    "[PAD]",
    "[UNK]",
    "the",
    "of",
    "a",
    "in",
    "and",
    "is",
    "to",
    "object",
    "value",
    "type",
    "name",
    "class",
    "statement",
    "expression",
]


def run(folder, output):
    return CliRunner().invoke(main, ["demo", "--quick", "--device", "cpu", "--model", str(folder), "--output", str(output)])


def fails(folder, output):
    """Run the command, expect it to refuse, and return what it said."""
    result = run(folder, output)
    assert isinstance(result.exception, SystemExit), result.exception  # not a traceback
    assert result.exit_code == 1
    return " ".join(result.output.split())


def save(model, folder):
    """Write a checkpoint with a tokenizer of a few words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: code for code, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def tiny_llama(dtype):
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize(("dtype", "name", "size"), [(torch.float32, "fp32", 4), (torch.bfloat16, "bf16", 2)])
def test_causal_language_model(tmp_path, dtype, name, size):
    result = run(save(tiny_llama(dtype), tmp_path / "tiny-llama"), tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["language_model"]["model"] == "tiny-llama"
    assert "training" not in results
    original, *quantized = results["language_model"]["formats"]
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert original["format"] == name
    assert original["linear_layers"] == 14  # without lm_head
    assert original["linear_bytes"] == size * matrices
    assert [result["format"] for result in quantized] == ["int8", "nf4", "nf4-nested", "fp4"]
    for other in quantized:
        assert original["weight_bytes"] - other["weight_bytes"] == original["linear_bytes"] - other["linear_bytes"] > 0
        # An untrained model spreads its bets over all words, whatever its precision. Measured: up to 0.2 % and 2.6 %.
        bound = 0.005 if other["format"] == "int8" else 0.05
        assert other["perplexity"] == pytest.approx(original["perplexity"], rel=bound)
        assert other["perplexity"] == pytest.approx(len(WORDS), rel=0.25)
        assert other["perplexity"] != original["perplexity"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "report.md",
        "results.json",
        "language_model.png",
    }


def test_layers_that_store_their_weight_transposed_count_as_linear(tmp_path):
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=64, n_layer=1, n_head=4, n_positions=48)
    model = transformers.GPT2LMHeadModel(config)
    result = run(save(model, tmp_path / "tiny-gpt2"), tmp_path / "out")
    assert result.exit_code == 0, result.output
    original, int8, *_ = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["language_model"]["formats"]
    assert original["linear_layers"] == 4
    assert original["linear_bytes"] == 4 * (12 * 64 * 64 + 9 * 64)
    assert int8["perplexity"] == pytest.approx(original["perplexity"], rel=1e-3)


def test_encoder(tmp_path):
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    result = run(save(transformers.BertForMaskedLM(config), tmp_path / "tiny-bert"), tmp_path / "out")
    assert result.exit_code == 0, result.output
    formats = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["encoder"]["formats"]
    cosines = {result["format"]: result["cosine_mean"] for result in formats}
    assert cosines["fp32"] == pytest.approx(1)
    assert 1 > cosines["int8"] > 0.999
    assert cosines["int8"] > cosines["nf4"] > 0.98
    assert "Sentence encoder tiny-bert" in result.output


def test_folder_without_a_checkpoint(tmp_path):
    assert f"{tmp_path} has no config.json" in fails(tmp_path, tmp_path / "out")


def test_broken_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')  # without a type, transformers guesses by the path
    assert f"transformers cannot read the configuration in {tmp_path}" in fails(tmp_path, tmp_path / "out")


def test_checkpoint_without_weights(tmp_path):
    folder = save(tiny_llama(torch.float32), tmp_path / "tiny-llama")
    (folder / "model.safetensors").unlink()
    assert f"transformers cannot read the model in {folder}" in fails(folder, tmp_path / "out")


def test_checkpoint_without_a_tokenizer(tmp_path):
    tiny_llama(torch.float32).save_pretrained(str(tmp_path / "tiny-llama"))
    assert f"transformers cannot read the tokenizer in {tmp_path / 'tiny-llama'}" in fails(
        tmp_path / "tiny-llama", tmp_path / "out"
    )


def test_encoder_decoder_is_refused(tmp_path):
    transformers.T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(str(tmp_path))
    assert "holds an encoder-decoder (T5ForConditionalGeneration)" in fails(tmp_path, tmp_path / "out")


def test_missing_transformers_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name, *rest))
    said = fails(tmp_path, tmp_path / "out")
    assert said.endswith("--model reads checkpoints with transformers, which is not installed; pip install transformers")
