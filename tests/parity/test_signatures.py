"""Functions and modules have the parameters and the defaults of bitsandbytes 0.50.2, in its order."""

import inspect

import pytest

import bnb_core as bnb
from bnb_core import functional as F
from bnb_core import nn

bitsandbytes = pytest.importorskip("bitsandbytes")


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", [name for name in F.__all__ if callable(getattr(F, name)) and name != "QuantState"])
def test_functional(name):
    assert parameters(getattr(F, name)) == parameters(getattr(bitsandbytes.functional, name))


@pytest.mark.parametrize("name", ["matmul", "matmul_4bit"])
def test_products(name):
    assert parameters(getattr(bnb, name)) == parameters(getattr(bitsandbytes, name))


def test_matmul_state():
    ours, theirs = bnb.MatmulLtState(), bitsandbytes.MatmulLtState()
    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public <= set(dir(ours))
    for name in sorted(public - {"reset_grads"}):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("CxB", "CxBt", "formatB", "_tile_indices"):
        for state in (ours, theirs):
            with pytest.warns(FutureWarning, match=name):
                assert getattr(state, name) is None


@pytest.mark.parametrize("name", [name for name in nn.__all__ if hasattr(bitsandbytes.nn, name)])
def test_modules(name):
    ours, theirs = getattr(nn, name), getattr(bitsandbytes.nn, name)
    if "Params" in name:
        assert parameters(ours.__new__) == parameters(theirs.__new__)
    else:
        assert parameters(ours) == parameters(theirs)


def test_every_module_is_there():
    public = {name for name, value in vars(bitsandbytes.nn).items() if inspect.isclass(value)}
    assert public <= set(nn.__all__)
