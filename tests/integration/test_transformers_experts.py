"""The fused experts of transformers, which are parameters and no linear layers, in 4 bits."""

import copy

import pytest
import torch

from bnb_core import functional
from bnb_core.nn.parametrize import replace_parameter_4bit

llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")


def experts_of():
    config = llama4.Llama4TextConfig(hidden_size=32, intermediate_size=48, num_local_experts=4, hidden_act="silu")
    module = llama4.Llama4TextExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module


def test_experts_of_llama4():
    module = experts_of()
    dequantized, names = copy.deepcopy(module), ("gate_up_proj", "down_proj")
    before = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    for name in names:
        values = getattr(dequantized, name)
        assert values.dim() == 3
        values.data = functional.dequantize_4bit(*functional.quantize_4bit(values.data, quant_type="nf4"))
        replace_parameter_4bit(module, name)
    after = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    assert after * 8 == before
    x = torch.randn(4 * 6, 32, requires_grad=True)
    assert torch.equal(module(x), dequantized(x))
    loaded = experts_of()
    for name in names:
        replace_parameter_4bit(loaded, name)
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(x), dequantized(x))
