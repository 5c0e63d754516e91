"""The package of the conformance suite: `import *` brings each of its tests, and nothing else."""

import importlib
import pkgutil

from bnb_core.ops.spec import OPS
from bnb_core.testing import calls, conformance, expectations


def _defined():
    for module in pkgutil.iter_modules(conformance.__path__, conformance.__name__ + "."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.startswith("test_") and value.__module__ == module.name:
                yield name


def test_star_import_brings_every_test_under_a_name_of_its_own():
    assert sorted(_defined()) == sorted(conformance.__all__)


def test_every_op_has_a_call_and_an_expectation():
    assert set(calls._CALLS) == set(expectations._EXPECTATIONS) == set(OPS)


def test_every_op_and_dtype_runs_somewhere():
    covered = set()
    for name in conformance.__all__:
        for mark in getattr(conformance, name).pytestmark:
            if mark.args[0] == ("bnb_op", "bnb_dtype"):
                covered.update(mark.args[1])
    assert covered == {(op, dtype) for op, spec in OPS.items() for dtype in spec.dtypes}
