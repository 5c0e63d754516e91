"""What `bnb quantize` writes, transformers and `load_quantized` load, with the same results."""

import importlib.util

import pytest
import torch

import bnb_core as bnb

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

TOKENS = torch.arange(12).view(2, 6)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}


def make(kind, tied=False):
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=4)).eval()
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()


KINDS = [("llama", False), ("llama", True), ("gpt2", True), ("bert", True)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-tied" if kind[1] else kind[0])
def model(request):
    return make(*request.param)


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_load_quantized(tmp_path, model, to):
    model.save_pretrained(str(tmp_path / "source"), max_shard_size="100KB", safe_serialization=True)
    report = bnb.quantize_checkpoint(
        tmp_path / "source", tmp_path / "out", to, compute_dtype=None if to == "int8" else torch.float32
    )
    loaded = bnb.load_quantized(tmp_path / "out", "cpu")
    assert type(loaded) is type(model)
    in_memory = bnb.quantize_model(model, to, skip=("lm_head", "cls"), compute_dtype=None if to == "int8" else torch.float32)
    assert {layer.name for layer in report.layers} == {layer.name for layer in in_memory.layers}
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers loads quantized models with accelerate")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_transformers_loads_it(tmp_path, model, to):
    model.save_pretrained(str(tmp_path / "source"), max_shard_size="100KB", safe_serialization=True)
    report = bnb.quantize_checkpoint(tmp_path / "source", tmp_path / "out", to)
    loaded, info = type(model).from_pretrained(
        str(tmp_path / "out"), device_map="cpu", torch_dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    classes = ("Linear4bit", "Linear8bitLt")
    quantized = {name for name, module in loaded.named_modules() if type(module).__name__ in classes}
    assert quantized == {layer.name for layer in report.layers}
    expected = bnb.load_quantized(tmp_path / "out", "cpu")
    with torch.no_grad():
        found = loaded(TOKENS).logits
        reference = expected(TOKENS).logits
        assert (found - reference).norm() / reference.norm() < 0.02


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers loads quantized models with accelerate")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_transformers_loads_a_saved_model_in_shards(tmp_path, to):
    model = make("llama")
    bnb.quantize_model(model, to)
    with torch.no_grad():
        reference = model(TOKENS).logits
    bnb.save_quantized(model, tmp_path / "saved", shard_bytes=20_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(str(tmp_path / "saved"), device_map="cpu", torch_dtype=torch.float32)
    with torch.no_grad():
        found = loaded(TOKENS).logits
    assert (found - reference).norm() / reference.norm() < 0.02
