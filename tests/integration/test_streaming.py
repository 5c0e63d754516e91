"""`bnb quantize`: the bytes are those of modules quantized in memory, and nothing that goes wrong leaves a half-made checkpoint."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import bnb_core as bnb
from bnb_core.cli import main
from bnb_core.errors import CheckpointError, InvalidArgumentError, StorageError
from bnb_core.integrations import streaming
from bnb_core.integrations.safetensors_file import SafetensorsReader, SafetensorsWriter, header_bytes

safetensors = pytest.importorskip("safetensors.torch")

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
RELIABILITY = Path(__file__).parents[1] / "reliability"
LAYERS = [f"model.layers.{index}.mlp.{name}_proj" for index in range(2) for name in ("up", "down")]


def weights(dtype=torch.float32):
    """A model with sizes that fill no block, in the names of Llama."""
    tensors = {"model.embed_tokens.weight": torch.randn(11, 36), "model.norm.weight": torch.randn(36)}
    for name in LAYERS:
        tensors[f"{name}.weight"] = torch.randn(55, 35) if "up" in name else torch.randn(36, 64)
        tensors[f"{name}.bias"] = torch.randn(55 if "up" in name else 36)
    tensors["lm_head.weight"] = torch.randn(11, 36)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write(folder, tensors, shards=1, config=CONFIG):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        safetensors.save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
        return folder
    places = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[index::shards]}
        safetensors.save_file(part, str(folder / file), {"format": "pt"})
        places.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def read(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found.update(safetensors.load_file(str(path)))
    return found


def in_memory(tensors, to, double_quant=True):
    """What modules quantized in memory save."""
    expected = dict(tensors)
    for name in LAYERS:
        weight = expected.pop(f"{name}.weight")
        if to == "int8":
            layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
        else:
            layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = bnb.nn.Params4bit(weight, quant_type=to, compress_statistics=double_quant, module=layer)
        expected.update({f"{name}.{key}": value for key, value in layer.to("cpu").state_dict().items()})
    return expected


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_bytes_as_in_memory(tmp_path, monkeypatch, to, shards, dtype):
    monkeypatch.setattr(streaming, "PANEL", 64 * 35)  # several panels of one weight
    tensors = weights(dtype)
    source = write(tmp_path / "source", tensors, shards)
    report = bnb.quantize_checkpoint(source, tmp_path / "out", to)
    assert_same(read(tmp_path / "out"), in_memory(tensors, to))
    assert [layer.name for layer in report.layers] == sorted(LAYERS)
    assert report.skipped == {"lm_head": "it is an output layer", "model.embed_tokens": "it is an embedding"}
    assert report.bytes_before - report.bytes_after == sum(layer.bytes_before - layer.bytes_after for layer in report.layers)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in source.iterdir()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] == (to == "int8")
    assert "lm_head" in config["llm_int8_skip_modules"]
    if to != "int8":
        assert config["bnb_4bit_compute_dtype"] == str(dtype).split(".")[1]
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(read(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


def test_skip_and_plain_scales(tmp_path):
    tensors = weights()
    write(tmp_path / "source", tensors)
    report = bnb.quantize_checkpoint(
        tmp_path / "source", tmp_path / "out", "nf4", skip=("layers.1", "layers.*.up_proj"), double_quant=False
    )
    assert [layer.name for layer in report.layers] == ["model.layers.0.mlp.down_proj"]
    found, expected = read(tmp_path / "out"), in_memory(tensors, "nf4", double_quant=False)
    name = "model.layers.0.mlp.down_proj.weight.absmax"
    assert torch.equal(found[name], expected[name])
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"])


def test_transposed_weights_of_gpt2(tmp_path):
    weight = torch.randn(64, 96)
    write(tmp_path / "source", {"h.0.attn.c_attn.weight": weight, "wte.weight": torch.randn(8, 64)}, config={"model_type": "gpt2"})
    bnb.quantize_checkpoint(tmp_path / "source", tmp_path / "out", "int8")
    found = read(tmp_path / "out")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.T.contiguous())
    assert torch.equal(found["h.0.attn.c_attn.weight"], codes)
    assert torch.equal(found["h.0.attn.c_attn.SCB"], scales)


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


def test_a_killed_run_goes_on(tmp_path):
    tensors = weights()
    source = write(tmp_path / "source", tensors, shards=3)
    work = tmp_path / "out.partial"

    def kill(count, what):
        if (work / "model-00001-of-00003.safetensors").exists():
            raise Killed

    with pytest.raises(Killed):
        bnb.quantize_checkpoint(source, tmp_path / "out", progress=kill)
    assert not (tmp_path / "out").exists()
    first = work / "model-00001-of-00003.safetensors"
    made = first.stat().st_mtime_ns
    seen = []
    bnb.quantize_checkpoint(source, tmp_path / "out", progress=lambda count, what: seen.append(what))
    assert "model-00001-of-00003.safetensors was finished before" in seen
    assert (tmp_path / "out" / first.name).stat().st_mtime_ns == made
    assert_same(read(tmp_path / "out"), in_memory(tensors, "nf4"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that were forked")
def test_a_kill_at_any_step(tmp_path):
    write(tmp_path / "source", {f"model.layers.{index}.up_proj.weight": torch.randn(8, 64) for index in range(2)}, shards=2)
    (tmp_path / "folder").mkdir()
    run = subprocess.run(
        [sys.executable, str(RELIABILITY / "kill_everywhere.py"), str(tmp_path / "source"), str(tmp_path / "folder")],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(run.stdout) > 30


def test_two_at_once(tmp_path):
    tensors = weights()
    source = write(tmp_path / "source", tensors)
    refused = []

    def begin_another(count, what):
        with pytest.raises(StorageError, match="is being written by process") as caught:
            bnb.quantize_checkpoint(source, tmp_path / "out")
        refused.append(caught)
        with pytest.raises(StorageError, match="is being written by process"):
            bnb.save_quantized(small_model(), tmp_path / "out")

    bnb.quantize_checkpoint(source, tmp_path / "out", progress=begin_another)
    assert refused
    assert_same(read(tmp_path / "out"), in_memory(tensors, "nf4"))


def small_model():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    bnb.quantize_model(model)
    return model


@pytest.mark.parametrize("change", ["damage", "other options"])
def test_what_does_not_fit_is_made_again(tmp_path, change):
    tensors = weights()
    source = write(tmp_path / "source", tensors, shards=2)
    work = tmp_path / "out.partial"

    def kill(count, what):
        if (work / "model-00001-of-00002.safetensors").exists():
            raise Killed

    with pytest.raises(Killed):
        bnb.quantize_checkpoint(source, tmp_path / "out", progress=kill)
    to = "nf4"
    if change == "damage":
        path = work / "model-00001-of-00002.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        to = "int8"
    bnb.quantize_checkpoint(source, tmp_path / "out", to)
    assert_same(read(tmp_path / "out"), in_memory(tensors, to))


def test_no_space_left(tmp_path, monkeypatch):
    source = write(tmp_path / "source", weights())

    def write_nothing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "_write_bytes", write_nothing)
    with pytest.raises(StorageError, match=r"No space left on device.*run it again"):
        bnb.quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damage_nothing_but(name, content):
    def damage(folder):
        (folder / name).write_bytes(content)

    return damage


SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_nothing_but(INDEX, b"{"), "index.json is damaged"),
        (damage_nothing_but(INDEX, b"[]"), "not an object"),
        (damage_nothing_but(INDEX, b"{}"), "has no weight_map"),
        (damage_nothing_but(INDEX, b'{"weight_map": {"a": "../a.safetensors"}}'), "name of a file beside the index"),
        (damage_nothing_but(INDEX, json.dumps({"weight_map": {"a": SHARD}}).encode()), "but it does not"),
        (lambda folder: (folder / INDEX).unlink(), "neither model.safetensors nor"),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (damage_nothing_but("config.json", b'{"quantization_config": {}}'), "is quantized already"),
        (damage_nothing_but(SHARD, b"nothing"), "no safetensors file"),
        (damage_nothing_but(SHARD, (2).to_bytes(8, "little") + b"[]"), "header is damaged"),
        (lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1]), "cut off"),
    ],
)
def test_damaged_source(tmp_path, damage, said):
    source = write(tmp_path / "source", weights(), shards=2)
    damage(source)
    with pytest.raises(CheckpointError, match=said):
        bnb.quantize_checkpoint(source, tmp_path / "out")
    result = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "out").exists()


def test_destination_in_use(tmp_path):
    source = write(tmp_path / "source", weights())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="not an empty folder"):
        bnb.quantize_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "file").exists()


def test_command(tmp_path):
    source = write(tmp_path / "source", weights())
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "out"), "--to", "fp4", "--skip", "layers.1", "-v"])
    assert result.exit_code == 0, result.output
    assert "2 layers quantized to fp4" in result.output
    assert "model.layers.1.mlp.up_proj: skip has 'layers.1'" in result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_writer_aligns_tensors_of_any_size(tmp_path):
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(3), "c": torch.randn(5).half(), "d": torch.randn(4)}
    room = sum(header_bytes(name, 1) for name in tensors)
    with SafetensorsWriter(tmp_path / "file", room, {}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()
    assert_same(safetensors.load_file(str(tmp_path / "file")), tensors)
    with SafetensorsReader(tmp_path / "file") as reader:
        assert all(entry.start % tensors[name].element_size() == 0 for name, entry in reader.entries.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(tmp_path):
    """The bounds are below what the whole checkpoint takes, which is 600 MB."""
    subprocess.run([sys.executable, str(RELIABILITY / "quantize_memory.py"), str(tmp_path), "0.6"], check=True)
