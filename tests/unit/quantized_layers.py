"""Layers with quantized weights, for the tests of what they all do alike, and what they compute, by other means."""

import inspect

import pytest
import torch

from bnb_core import nn, ops
from bnb_core.quantization.layout import as_bytes
from bnb_core.testing import oracle
from bnb_core.testing.tolerances import as_numpy

IN, OUT = 48, 20
ASSIGNS = "assign" in inspect.signature(torch.nn.Module.load_state_dict).parameters

MAKERS = {
    "nf4": lambda **kw: nn.LinearNF4(IN, OUT, compress_statistics=False, **kw),
    "nf4-nested": lambda **kw: nn.LinearNF4(IN, OUT, **kw),
    "fp4-bfloat16": lambda **kw: nn.LinearFP4(IN, OUT, quant_storage=torch.bfloat16, **kw),
    "nf4-float32": lambda **kw: nn.LinearNF4(IN, OUT, quant_storage=torch.float32, **kw),
    "int8": lambda **kw: nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, **kw),
    "int8-threshold": lambda **kw: nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=2.0, **kw),
}
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
assigning = pytest.mark.parametrize(
    "assign",
    [False, pytest.param(True, marks=pytest.mark.skipif(not ASSIGNS, reason="load_state_dict cannot assign"))],
    ids=["copy", "assign"],
)


def weight_of(module):
    """The float32 values that the weight stands for, read without the parameter's help."""
    data = module.weight.data
    if data.dtype == torch.int8:
        return ops.int8_dequantize_rows(data, module.state.SCB, torch.float32)
    s = module.quant_state
    return ops.dequantize_4bit(as_bytes(data), s.absmax, s.code, s.blocksize, s.shape, torch.float32, s.nested_statistics)


def expected_product(module, x):
    rows, bias = as_numpy(x).reshape(-1, IN), None if module.bias is None else as_numpy(module.bias.to(x.dtype))
    if module.weight.dtype == torch.int8:
        codes, absmax = as_numpy(module.weight), as_numpy(module.state.SCB)
        return oracle.int8_linear(rows, codes, absmax, bias, module.state.threshold)
    return oracle.product(rows, as_numpy(weight_of(module)), bias)


def bits(module):
    """Every tensor of a module as dtype, shape and bytes, by its name in a checkpoint."""
    return {
        name: (value.dtype, value.shape, value.device, None if value.is_meta else bytes(as_bytes(value).tolist()))
        for name, value in module.state_dict().items()
    }


def without_bias(entries):
    return {name: value for name, value in entries.items() if "bias" not in name}


def load(module, entries, assign=False, strict=True):
    return module.load_state_dict(entries, strict=strict, **({"assign": True} if assign else {}))


def plain_weight(module):
    """Replace the parameter by an ordinary one, as sharding does."""
    module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
    return module
