"""The float64 model that a quantized one stands for: its codes and scales, taken from its state dict, and ordinary products."""

import json

import torch
from torch import nn

from bnb_core.testing import oracle


class Int8Linear(nn.Module):
    """A layer that quantizes its input's rows, from the definition."""

    def __init__(self, codes, absmax, bias, threshold):
        super().__init__()
        self.arguments = (codes.numpy(), absmax.numpy(), None if bias is None else bias.detach().double().numpy(), threshold)

    def forward(self, x):
        rows = x.detach().float().reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(oracle.int8_linear(rows, *self.arguments).y).view(*x.shape[:-1], -1)


def dequantized(state, name):
    """Return the weight, in float64, that the entries of a 4-bit weight in a state dict stand for."""
    statistics = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
    description = next(json.loads(bytes(value.tolist())) for key, value in statistics.items() if "bitsandbytes__" in key)
    parts = {key: value.numpy() for key, value in statistics.items()}
    absmax, shape = parts["absmax"], description["shape"]
    if "nested_absmax" in parts:
        absmax = oracle.nested_absmax(
            absmax, parts["nested_absmax"], parts["nested_quant_map"], description["nested_offset"], description["nested_blocksize"]
        )
    packed = state[name].detach().reshape(-1).view(torch.uint8)
    codes = oracle.unpack(packed.numpy(), torch.Size(shape).numel())
    weight = oracle.dequantize_blockwise(codes, absmax, parts["quant_map"], description["blocksize"])
    return torch.from_numpy(weight).view(shape).double()


def exact_model(quantized, unquantized):
    """Return `unquantized` in float64 with the linear layers that those of `quantized` stand for. Its other values stay."""
    model, state = unquantized.double().eval(), quantized.state_dict()
    for name, layer in quantized.named_modules():
        if type(layer).__name__ == "Linear8bitLt":
            new = Int8Linear(state[f"{name}.weight"], state[f"{name}.SCB"], layer.bias, layer.state.threshold)
        elif type(layer).__name__ == "Linear4bit":
            new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).double()
            new.weight.data = dequantized(state, f"{name}.weight")
            if layer.bias is not None:
                new.bias.data = layer.bias.detach().double()
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model
