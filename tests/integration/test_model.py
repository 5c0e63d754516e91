"""`quantize_model`, `dequantize_model`, `save_quantized` and `load_quantized` on models of any kind."""

import errno
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

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


def test_weights_of_any_strides():
    """Kernels see what the layer computed with, not how it lay in memory."""
    x = torch.randn(3, 64)
    for weight in (torch.randn(64, 32).T, torch.randn(32, 128)[:, ::2], torch.randn(1, 64).expand(32, 64)):
        models = [nn.Sequential(nn.Linear(64, 32)) for _ in range(2)]
        models[0][0].weight = nn.Parameter(weight)
        models[1][0].weight = nn.Parameter(weight.contiguous())
        models[1][0].bias = models[0][0].bias
        for model in models:
            report = bnb.quantize_model(model)
            assert report.layers[0].bytes_before == 4 * 64 * 32
        assert torch.equal(models[0](x), models[1](x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_a_dequantized_model_has_the_dtype_that_it_had(dtype, bias, to):
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32, bias=bias)).to(dtype)
    weight = model[1].weight.detach().float()
    bnb.quantize_model(model, to)
    bnb.dequantize_model(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (model[1].weight.float() - weight).norm() < 0.1 * weight.norm()


def test_a_dtype_to_dequantize_to():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    bnb.quantize_model(model, skip=("1",))
    bnb.dequantize_model(model, torch.float16)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.float16] * 2 + [torch.float32] * 2


def test_buffers_stay_and_are_counted():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval()
    mean = model[1].running_mean
    report = bnb.quantize_model(model)
    assert model[1].running_mean is mean
    sizes = [value.numel() * value.element_size() for value in model.state_dict().values()]
    assert report.bytes_after == sum(sizes)


def test_hooks_stay():
    model = nn.Sequential(nn.Linear(64, 64))
    seen = []
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: seen.append("before")),
        model[0].register_forward_hook(lambda module, args, output: seen.append("after")),
        model[0].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward")),
    ]
    x = torch.randn(2, 64, requires_grad=True)
    for change in (bnb.quantize_model, bnb.dequantize_model):
        change(model)
        model(x).sum().backward()
        assert seen == ["before", "after", "backward"]
        seen.clear()
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert seen == []


def pruned():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def weight_normed():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    return model


def one_weight_in_two_layers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight = model[1].weight
    return model


def double_precision():
    return nn.Sequential(nn.Linear(64, 64).double(), nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (pruned, {"0": "its weight is no parameter of its own"}),
        (weight_normed, {"0": "it is a ParametrizedLinear, not an nn.Linear itself"}),
        (one_weight_in_two_layers, {"0": "its weight is shared with 1", "1": "its weight is shared with 0"}),
        (double_precision, {"0": "its weight is torch.float64"}),
    ],
)
def test_what_is_left_alone(make, reasons):
    model = make()
    kept = {name: model.get_submodule(name) for name in reasons}
    report = bnb.quantize_model(model)
    assert report.skipped == reasons
    assert all(model.get_submodule(name) is module for name, module in kept.items())
    assert [layer.name for layer in report.layers] == [str(len(model) - 1)]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("layers.0",), ["layers.0.mlp.down", "layers.0.mlp.up"]),
        (("layers.*.mlp.up",), ["layers.0.mlp.up", "layers.1.mlp.up"]),
        (("up",), ["layers.0.mlp.up", "layers.1.mlp.up"]),
        (("mlp.d*n",), ["layers.0.mlp.down", "layers.1.mlp.down"]),
        (("layer", "u", "lm_head"), []),
    ],
)
def test_patterns(skip, left):
    def block():
        return nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 64)})})

    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
    report = bnb.quantize_model(model, skip=skip)
    assert sorted(report.skipped) == left
    assert len(report.layers) == 4 - len(left)


def test_weights_that_are_not_there():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
    with pytest.raises(InvalidArgumentError, match="1 is on the meta device; load the model's weights first"):
        bnb.quantize_model(model)
    assert type(model[0]) is nn.Linear
    with pytest.raises(InvalidArgumentError, match="is one itself, which cannot be replaced in place"):
        bnb.quantize_model(nn.Linear(64, 64))
