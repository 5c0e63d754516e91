"""Every public name of bitsandbytes 0.50.2 exists here with the same signature, or stands in the documentation's table."""

import ast
import importlib
import inspect
import re
import textwrap
import types
import typing
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes")

MODULES = (
    *("functional", "utils", "nn", "nn.modules", "nn.parametrize", "optim", "optim.optimizer", "autograd", "autograd._functions"),
    *(f"optim.{name}" for name in ("adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "rmsprop", "sgd")),
)
PAGE = Path(__file__).parents[2] / "docs" / "move-from-bitsandbytes.md"
MISSING = object()


def theirs(module):
    return importlib.import_module(f"bitsandbytes.{module}")


def ours(module, name):
    """Classes of bitsandbytes' modules for single optimizers are all in `bnb_core.optim`."""
    single = module.startswith("optim.") and module != "optim.optimizer"
    return getattr(importlib.import_module("bnb_core.optim" if single else f"bnb_core.{module}"), name, MISSING)


def is_own(module, value):
    """Say whether a value belongs to this module or package, rather than being imported, or there for type checkers and logs."""
    if isinstance(value, typing.TypeVar):
        return False
    home = str(getattr(value, "__module__", ""))
    if callable(value):
        return home == f"bitsandbytes.{module}" or home.startswith(f"bitsandbytes.{module}.")
    return home.startswith("bitsandbytes") or isinstance(value, (dict, float, torch.device))


def public_names(module):
    return sorted(name for name, value in vars(theirs(module)).items() if not name.startswith("_") and is_own(module, value))


def methods(cls):
    """The public functions and properties of a class, each with the class of bitsandbytes that first has it."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("bitsandbytes")]
    kinds = (types.FunctionType, staticmethod, classmethod, property)
    first = {name: base.__name__ for base in bases for name, value in vars(base).items() if isinstance(value, kinds)}
    return {name: base for name, base in first.items() if not name.startswith("_")}


def parameters(value):
    if isinstance(value, type) and issubclass(value, torch.nn.Parameter):
        value = value.__new__
    return [(p.name, p.kind, p.default) for p in inspect.signature(value).parameters.values()]


def differs(peer, own):
    """Say whether a call that bitsandbytes takes means something else here. What is only here is given by keyword, or not."""
    wanted, found = parameters(peer), parameters(own)
    extra = found[len(wanted) :]
    optional = all(kind is inspect.Parameter.KEYWORD_ONLY and default is not inspect.Parameter.empty for _, kind, default in extra)
    return found[: len(wanted)] != wanted or not optional


def unused(function):
    """Name the parameters that a function of ours does not read, but in its docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    read = {node.id for node in ast.walk(ast.Module(tree.body, [])) if isinstance(node, ast.Name)}
    given = tree.args.posonlyargs + tree.args.args + tree.args.kwonlyargs
    return [arg.arg for arg in given if arg.arg not in read and arg.arg not in ("self", "cls", "ctx")]


def functions(value):
    """The functions of ours that take the arguments of a class or function of bitsandbytes."""
    if inspect.isfunction(value):
        return [value]
    maker = value.__new__ if issubclass(value, torch.nn.Parameter) else value.__init__
    members = [maker, *(getattr(value, name) for name in methods_of(value))]
    return [getattr(member, "__func__", member) for member in members if inspect.isroutine(member)]


def methods_of(value):
    bases = [base for base in value.__mro__ if base.__module__.startswith("bnb_core")]
    kinds = (types.FunctionType, staticmethod, classmethod)
    return sorted({name for base in bases for name, v in vars(base).items() if isinstance(v, kinds) and not name.startswith("_")})


def compare():
    """Name what is missing here, and what has another signature."""
    missing, different = set(), set()
    for module in MODULES:
        for name in public_names(module):
            peer, own = getattr(theirs(module), name), ours(module, name)
            if own is MISSING:
                missing.add(name)
                continue
            if not callable(peer):
                continue
            if differs(peer, own):
                different.add(name)
            for method, base in methods(peer).items() if isinstance(peer, type) else ():
                peer_method, own_method = getattr(peer, method), getattr(own, method, MISSING)
                if own_method is MISSING:
                    missing.add(f"{base}.{method}")
                elif callable(peer_method) and differs(peer_method, own_method):
                    different.add(f"{base}.{method}")
    return missing, different


def documented(heading):
    """The names in the first column of the table below a heading of the page."""
    if not PAGE.exists():
        pytest.skip("the documentation is not beside these tests")
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.split("\n") if line.startswith("|")][2:]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(set(names)) == len(names)
    return set(names)


def test_the_table_of_exceptions_is_exact():
    missing, different = compare()
    exceptions = documented("What is not there")
    beyond = {name for name in exceptions if name.split(".")[0] in ("cextension", "cuda_specs", "backends", "diagnostics")}
    assert exceptions - beyond == missing | different


def test_no_argument_is_accepted_and_ignored():
    ignored = {}
    for module in MODULES:
        for name in public_names(module):
            own = ours(module, name)
            if callable(own):
                for function in functions(own):
                    if str(function.__module__).startswith("bnb_core") and unused(function):
                        ignored[function.__qualname__] = unused(function)
    assert ignored == {
        # What torch calls hooks of this kind with.
        "maybe_rearrange_weight": ["local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs"],
        # To be overridden: says so when it is called, or has a value that no option changes.
        "OutlierAwareLinear.forward_with_outliers": ["x", "outlier_idx"],
        "OutlierAwareLinear.quantize_weight": ["w", "outlier_idx"],
        "Optimizer.initial_value": ["options"],
    }


def test_enough_is_compared():
    counts = {module: len(public_names(module)) for module in MODULES}
    assert counts["functional"] > 35
    assert counts["optim"] >= 40
    assert counts["nn"] == 13
    assert {"init_state", "update_step", "get_config"} <= set(methods(theirs("optim.optimizer").Optimizer8bit))
    assert differs(lambda a, b=1: None, lambda a, b=2: None)
    assert differs(lambda a, b=1: None, lambda b, a=1: None)
    assert differs(lambda a: None, lambda a, b=1: None)
    assert not differs(lambda a: None, lambda a, *, b=1: None)


@pytest.mark.parametrize("name", ["C", "FIRST_CUDA_DEVICE"])
def test_constants_are_equal(name):
    assert ours("functional", name) == getattr(theirs("functional"), name)


@pytest.mark.parametrize("name", ["LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING", "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING"])
def test_mappings_are_equal(name):
    assert ours("utils", name) == getattr(theirs("utils"), name)


def test_matmul_state():
    own, peer = ours("autograd._functions", "MatmulLtState")(), theirs("autograd._functions").MatmulLtState()
    public = {name for name in dir(peer) if not name.startswith("_")}
    assert public <= set(dir(own))
    for name in sorted(public - {"reset_grads"}):
        assert getattr(own, name) == getattr(peer, name), name
    for name in ("CxB", "CxBt", "formatB", "_tile_indices"):
        for state in (own, peer):
            with pytest.warns(FutureWarning, match=name):
                assert getattr(state, name) is None
