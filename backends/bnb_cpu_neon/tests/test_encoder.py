"""The demo's sentence encoder, with real weights, on this backend and no other."""

from __future__ import annotations

import copy
from functools import partial

import torch

from bnb_core import backends
from bnb_core.cli.demo.formats import in_each_format
from bnb_core.cli.demo.minilm import MiniLM
from bnb_core.cli.demo.sentences import QUERIES, SENTENCES

#: Least cosine similarity of an embedding with that of unquantized weights, and with the reference's in the same format. Of
#: LLM.int8() the latter is less: where sums differ in their last bit, another code of the next layer's input may be the nearest.
LEAST = {"fp32": (1, 1), "int8": (0.998, 0.9995), "nf4": (0.97, 1), "nf4-nested": (0.97, 1), "fp4": (0.93, 1)}
ROUNDING = 1e-6
#: Few, for machines that emulate the CPU.
TEXT = [*SENTENCES[:1], *QUERIES[:1]]


def test_embeddings_in_each_format():
    encoder = MiniLM.installed(torch.device("cpu"))
    loaded = encoder.load()
    inputs = encoder.prepare(TEXT)
    similarities, original = {}, None
    with backends.use_backend("neon"), torch.no_grad():
        for model, facts in in_each_format(partial(copy.deepcopy, loaded), encoder.device):
            embeddings = encoder.embed(model, inputs)
            with backends.use_backend("reference"):
                expected = encoder.embed(model, inputs)
            original = embeddings if original is None else original
            similarities[facts.format] = [(embeddings * other).sum(1).min().item() for other in (original, expected)]
    assert not backends.fallbacks()
    assert similarities.keys() == LEAST.keys()
    for name, found in similarities.items():
        for similarity, least in zip(found, LEAST[name]):
            assert least - ROUNDING <= similarity <= 1 + ROUNDING, name
