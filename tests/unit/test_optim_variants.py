"""The named classes: what they fix, and what they take."""

import inspect

import pytest
import torch

from bnb_core import optim
from bnb_core.errors import InvalidArgumentError

FORMATS = {"8bit": 8, "32bit": 32}
NAMED = [name for name in optim.__all__ if name.endswith(tuple(FORMATS)) or name.startswith("Paged")]


def create(name, **options):
    cls = getattr(optim, name)
    if "lr" in inspect.signature(cls).parameters and inspect.signature(cls).parameters["lr"].default is inspect.Parameter.empty:
        options = {"lr": 0.1, **options}
    return cls([torch.nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize("name", NAMED)
def test_name_says_format_and_paging(name):
    optimizer = create(name)
    bits = next((bits for ending, bits in FORMATS.items() if name.endswith(ending)), 32)
    assert optimizer.args.optim_bits == bits
    assert optimizer.is_paged == name.startswith("Paged")


@pytest.mark.parametrize("name", NAMED)
def test_capturable_is_the_only_argument_that_bitsandbytes_has_not(name):
    parameters = inspect.signature(getattr(optim, name)).parameters.values()
    extra = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert extra == ["capturable"]
    assert create(name, capturable=True).param_groups[0]["capturable"] is True


def test_variants_of_a_class_may_be_told_apart_and_share_their_base():
    assert issubclass(optim.PagedAdamW8bit, optim.AdamW)
    assert optim.AdamW8bit.__name__ == "AdamW8bit"
    assert optim.AdamW8bit.__module__ == "bnb_core.optim.variants"
    assert not issubclass(optim.AdamW, optim.Lion)


@pytest.mark.parametrize(
    ("name", "argument", "accepted", "refused"),
    [
        ("Adam8bit", "optim_bits", (32, 8), 16),
        ("AdamW32bit", "optim_bits", (32,), 8),
        ("PagedAdamW8bit", "optim_bits", (32, 8), 4),
        ("Adagrad8bit", "optim_bits", (8,), 32),
        ("PagedAdam", "is_paged", (False, True), None),
    ],
)
def test_arguments_that_have_one_meaning(name, argument, accepted, refused):
    for value in accepted:
        optimizer = create(name, **{argument: value})
        assert optimizer.args.optim_bits == (8 if name.endswith("8bit") else 32)
        assert optimizer.is_paged == name.startswith("Paged")
    with pytest.raises(InvalidArgumentError, match=f"{name}: {argument} is {refused}; this class has {argument}="):
        create(name, **{argument: refused})


def test_arguments_that_a_variant_has_not():
    with pytest.raises(TypeError, match="optim_bits"):
        create("Lion8bit", optim_bits=8)
    with pytest.raises(TypeError, match="is_paged"):
        create("PagedAdamW", is_paged=True)
    with pytest.raises(TypeError, match="lr"):
        optim.SGD8bit([torch.zeros(3)])


def test_positional_arguments_keep_their_places():
    params = [torch.nn.Parameter(torch.zeros(3))]
    optimizer = optim.PagedLion8bit(params, 0.5, (0.8, 0.9), 0.1, None, 7)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], optimizer.args.min_8bit_size) == (0.5, (0.8, 0.9), 0.1, 7)


@pytest.mark.parametrize("name", ["LAMB", "LAMB8bit", "LARS", "LARS32bit"])
def test_max_unorm_reaches_the_step(name):
    optimizer = create(name, max_unorm=0.25)
    assert optimizer.hyperparameters(optimizer.options(optimizer.param_groups[0])).max_unorm == 0.25
