"""`quantize_model`, `dequantize_model`, `save_quantized` and `load_quantized` on models of any kind."""

import errno
import json

import pytest
import torch
from torch import nn

import bnb_core as bnb
from bnb_core.errors import CheckpointError, InvalidArgumentError, StorageError
from bnb_core.integrations.checkpoint_folder import CheckpointFolder
from bnb_core.integrations.safetensors_file import SafetensorsWriter


class Tied(nn.Module):
    """A model with what is to be left alone: a tied output, an embedding, a norm, and layers that nobody calls."""

    def __init__(self, width=64):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width, bias=False)
        self.again = self.second
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.output = nn.Linear(width, 10, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("temporary", torch.tensor(3.0), persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.again(torch.relu(self.first(x)))
        x = self.attention(x, x, x)[0] * self.scale * self.temporary
        return self.output(self.norm(x))


TOKENS = torch.arange(10).view(10, 1)


@pytest.mark.parametrize(("to", "bound"), [("nf4", 0.1), ("fp4", 0.15), ("int8", 0.02)])
def test_quantize_then_dequantize(to, bound):
    model = Tied().eval()
    weight = model.second.weight.detach().clone()
    before = model(TOKENS)
    report = bnb.quantize_model(model, to)
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert report.skipped == {
        "attention.out_proj": "MultiheadAttention reads its weight itself",
        "output": "its weight is shared with embedding",
    }
    assert model.again is model.second
    assert isinstance(model.second, bnb.nn.Linear8bitLt if to == "int8" else bnb.nn.Linear4bit)
    assert report.layers[1].bytes_before == 4 * weight.numel()
    saved = {key: value for key, value in model.state_dict().items() if not key.startswith(("again.", "output."))}
    assert report.bytes_after == sum(value.numel() * value.element_size() for value in saved.values())
    assert "2 layers quantized to" in str(report)
    assert "output: its weight is shared with embedding" in str(report)
    after = model(TOKENS)
    assert 0 < (after - before).norm() / before.norm() < bound
    assert bnb.dequantize_model(model) == ["first", "second"]
    assert type(model.again) is nn.Linear
    assert 0 < (model.second.weight - weight).norm() / weight.norm() < bound


def test_arguments_of_4_bit_layers_arrive():
    model = Tied()
    bnb.quantize_model(model, "fp4", double_quant=False, compute_dtype=torch.float16, skip=("first",))
    assert type(model.first) is nn.Linear
    assert model.second.compute_dtype == torch.float16
    assert (model.second.quant_state.quant_type, model.second.quant_state.nested) == ("fp4", False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "nf5"}, "'nf5'"),
        ({"to": "int8", "double_quant": True}, "double_quant is True"),
        ({"to": "nf4", "threshold": 6.0}, "threshold is 6.0"),
        ({"to": "int8", "threshold": -1.0}, "threshold is -1.0"),
        ({"to": "nf4", "compute_dtype": torch.int8}, "compute_dtype is torch.int8"),
        ({"skip": "first"}, "skip is the string 'first'"),
        ({"skip": ("first", "second")}, "no linear layer to quantize"),
    ],
)
def test_refused(arguments, said):
    model = Tied()
    with pytest.raises(InvalidArgumentError, match=said):
        bnb.quantize_model(model, **arguments)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("to", ["nf4", "int8"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_save_and_load(tmp_path, to, device):
    model = Tied().eval()
    bnb.quantize_model(model, to)
    expected = model(TOKENS)
    bnb.save_quantized(model, tmp_path / "saved")
    other = Tied()
    if device == "meta":  # but for the buffer that no checkpoint has
        other = other.to("meta")
        other.temporary = torch.tensor(3.0)
        other.output.weight = other.embedding.weight
    loaded = bnb.load_quantized(tmp_path / "saved", "cpu", other)
    assert torch.equal(loaded(TOKENS), expected)
    assert loaded.output.weight is loaded.embedding.weight
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] == (to == "int8")


def test_load_names_what_does_not_fit(tmp_path):
    model = Tied()
    bnb.quantize_model(model, "nf4")
    bnb.save_quantized(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"is \[10, 64\] in the checkpoint and \[10, 32\] in the model"):
        bnb.load_quantized(tmp_path / "saved", "cpu", Tied(32))
    with pytest.raises(CheckpointError, match="nothing of that name"):
        bnb.load_quantized(tmp_path / "saved", "cpu", nn.Sequential(nn.Linear(64, 128)))
    with pytest.raises(InvalidArgumentError, match="not an empty folder"):
        bnb.save_quantized(model, tmp_path / "saved")


def test_shards(tmp_path):
    model = Tied().eval()
    bnb.quantize_model(model, "nf4")
    expected = model(TOKENS)
    bnb.save_quantized(model, tmp_path / "whole")
    bnb.save_quantized(model, tmp_path / "saved", shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert files == [f"model-{index + 1:05}-of-{len(files):05}.safetensors" for index in range(len(files))]
    assert len(files) > 2
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert len({index["weight_map"][name] for name in index["weight_map"] if name.startswith("first.")}) == 1
    entries = CheckpointFolder(tmp_path / "saved").entries
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in entries.values())
    assert set(entries) == set(CheckpointFolder(tmp_path / "whole").entries)
    assert torch.equal(bnb.load_quantized(tmp_path / "saved", "cpu", Tied())(TOKENS), expected)
    with pytest.raises(InvalidArgumentError, match="shard_bytes is 0"):
        bnb.save_quantized(model, tmp_path / "other", shard_bytes=0)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = Tied()
    bnb.quantize_model(model, "nf4")
    write = SafetensorsWriter._write_bytes

    def write_a_little(writer, data):
        if writer._offset > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, data)

    monkeypatch.setattr(SafetensorsWriter, "_write_bytes", write_a_little)
    with pytest.raises(StorageError, match="No space left on device"):
        bnb.save_quantized(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
