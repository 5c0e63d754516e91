"""Embeddings against those of bitsandbytes: the same codes and the same rows."""

import pytest
import torch

from bnb_core import nn
from bnb_core.quantization.layout import as_bytes

peer = pytest.importorskip("bitsandbytes")

ROWS, DIM = 40, 128
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(name, *args, **kwargs):
    """The two libraries' modules, made from the same values."""
    source = torch.nn.Embedding(ROWS, DIM).half()  # which bitsandbytes casts an int8 table to
    modules = []
    for library in (nn, peer.nn):
        module = getattr(library, name)(ROWS, DIM, *args, **kwargs)
        module.load_state_dict(source.state_dict(), strict=False)
        modules.append(module.to("cpu"))
    return modules


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["EmbeddingNF4", "EmbeddingFP4"])
def test_4bit(name, storage, dtype):
    ours, theirs = pair(name, dtype, storage)
    assert (ours.weight.dtype, ours.weight.shape) == (theirs.weight.dtype, theirs.weight.shape)
    assert torch.equal(as_bytes(ours.weight), as_bytes(theirs.weight.data))
    assert torch.equal(ours.quant_state.absmax, theirs.weight.quant_state.absmax)
    indices = torch.randint(ROWS, (3, 5))
    rows, expected = ours(indices), theirs(indices)
    assert rows.dtype == expected.dtype == dtype
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_8bit(dtype):
    ours, theirs = pair("Embedding8bit", dtype=dtype)
    assert torch.equal(ours.weight.data, theirs.weight.data)
    assert torch.equal(ours.state.SCB, theirs.weight.SCB)
    indices = torch.randint(ROWS, (3, 5))
    rows, expected = ours(indices), theirs(indices)
    assert rows.dtype == expected.dtype == dtype
    # bitsandbytes divides the scale by 127, which the contract here multiplies by 1/127: a last bit may differ.
    torch.testing.assert_close(rows, expected, rtol=max(torch.finfo(dtype).eps, 2**-22), atol=0)


@pytest.mark.parametrize("name", ["Embedding", "StableEmbedding"])
def test_trained(name):
    ours, theirs = pair(name, padding_idx=3)
    indices = torch.tensor([[3, 1], [0, 39]])
    for module in (ours, theirs):
        module(indices).square().sum().backward()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(indices), theirs(indices))
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    torch.manual_seed(7)
    ours.reset_parameters()
    torch.manual_seed(7)
    theirs.reset_parameters()
    assert torch.equal(ours.weight, theirs.weight)


def test_their_quant_state_reads_what_an_embedding_saves():
    """bitsandbytes saves no quantized embedding; its format for a weight is the one that is written here."""
    module, _ = pair("EmbeddingNF4")
    entries = {name[len("weight.") :]: value for name, value in module.state_dict().items() if name != "weight"}
    state = peer.functional.QuantState.from_dict(entries, device="cpu")
    assert torch.equal(peer.functional.dequantize_4bit(module.weight.data, state), module(torch.arange(ROWS)))
