"""Helpers: dictionaries as tensors, replaced layers, and where tensors are."""

import pytest
import torch

from bnb_core import functional as F
from bnb_core import nn, utils
from bnb_core.errors import CheckpointError, InvalidArgumentError


def test_dictionaries_are_packed():
    source = {"shape": [3, 4], "dtype": "float16", "name": "ü", "long": ["x" * 100] * 1000}
    packed = utils.pack_dict_to_tensor(source)
    assert packed.dtype == torch.uint8
    assert packed.dim() == 1
    assert utils.unpack_tensor_to_dict(packed) == source


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3), "is torch.float32"),
        (torch.tensor(list(b"[1]"), dtype=torch.uint8), "is a JSON list"),
        (torch.tensor(list(b"{"), dtype=torch.uint8), "is not JSON"),
        (torch.tensor([255, 254], dtype=torch.uint8), "is not JSON"),
        (torch.zeros(3, dtype=torch.uint8, device="meta"), "is on the meta device"),
    ],
)
def test_damaged_dictionaries_are_refused(tensor, message):
    with pytest.raises(CheckpointError, match=message):
        utils.unpack_tensor_to_dict(tensor)


class _Noted(torch.nn.Linear):
    """A layer with a method to call when it is replaced."""

    replaced = ()

    def note(self, module):
        type(self).replaced += (module,)


def model():
    model = torch.nn.Sequential(_Noted(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False)))
    model.add_module("lm_head", torch.nn.Linear(5, 6))
    return model


def test_linear_layers_are_replaced():
    before = model()
    first = before[0]
    _Noted.replaced = ()
    after = utils.replace_linear(
        before, lambda k, n, bias: nn.Linear8bitLt(k, n, bias, has_fp16_weights=True), ("lm_head",), True, "note"
    )
    assert after is before
    assert [type(module) for module in after.modules() if isinstance(module, torch.nn.Linear)] == [
        *(nn.Linear8bitLt, nn.Linear8bitLt, torch.nn.Linear)
    ]
    assert after[0].weight is first.weight
    assert after[1][0].bias is None
    assert _Noted.replaced == (first,)


def test_weights_are_not_copied_unless_asked_for():
    before = model()
    first = before[0]
    assert utils.replace_linear(before, torch.nn.Linear, skip_modules=())[0].weight is not first.weight
    assert type(before.lm_head) is torch.nn.Linear


def test_addresses_and_devices():
    tensor = torch.zeros(2)
    assert F.get_ptr(tensor).value == tensor.data_ptr()
    assert F.get_ptr(None) is None
    assert F.is_on_gpu([tensor, None, tensor]) is True
    with pytest.raises(InvalidArgumentError, match="is_on_gpu: tensors are on cpu, meta; move them to one device"):
        F.is_on_gpu([tensor, tensor.to("meta")])
    utils.sync_gpu(tensor)
    assert F.has_avx512bf16() is False


def test_weight_formats():
    def hook(state_dict):
        nn.modules.maybe_rearrange_weight(state_dict, "layer.", {}, True, [], [], [])
        return state_dict

    weight = torch.zeros(1)
    for row in (0, "row", torch.tensor(0, dtype=torch.uint8)):
        assert hook({"layer.weight": weight, "layer.weight_format": row}) == {"layer.weight": weight}
    assert hook({"layer.weight": weight}) == {"layer.weight": weight}
    assert hook({"layer.weight_format": 3}) == {"layer.weight_format": 3}
    for other in (2, "col_turing", torch.tensor(9)):
        with pytest.raises(CheckpointError, match="only row-major codes"):
            hook({"layer.weight": weight, "layer.weight_format": other})


def test_outliers_are_traced_by_the_hook():
    layer = torch.nn.Linear(8, 3)
    tracer = utils.OutlierTracer.get_instance()
    tracer.initialize(layer)
    x = torch.randn(4, 8) * 0.1
    x[0, 5] = 7.0
    utils.outlier_hook(layer, (x,))
    assert 5 in tracer.get_outliers(layer.weight)


@pytest.mark.parametrize("lost", [False, True], ids=["weight without its state", "ordinary parameter"])
def test_statistics_of_a_weight_come_back_from_the_module(lost):
    layer = nn.Linear4bit(64, 8, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu")
    x = torch.randn(2, 64)
    expected = layer(x)
    if lost:
        layer._parameters["weight"] = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    else:
        layer.weight.quant_state = None
    nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    assert isinstance(layer.weight, nn.Params4bit)
    assert layer.weight.quant_state is layer.quant_state
    assert layer.weight.quant_storage == torch.bfloat16
    assert torch.equal(layer(x), expected)
    nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    assert layer.weight.quant_state is layer.quant_state
