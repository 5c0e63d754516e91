"""What the built distributions say about themselves."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"bnb_core": "pyproject.toml", "bnb_reference": "backends/bnb_reference/pyproject.toml"}


def _distribution(name):
    metadata = pytest.importorskip("importlib.metadata" if __import__("sys").version_info >= (3, 10) else "importlib_metadata")
    return metadata.distribution(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_module_and_distribution_have_the_same_version(package):
    assert import_module(package).__version__ == _distribution(package.replace("_", "-")).version


@pytest.mark.parametrize("package", PACKAGES)
def test_distribution_declares_the_python_floor(package):
    assert _distribution(package.replace("_", "-")).metadata["Requires-Python"] == ">=3.8"


def test_a_backend_pins_the_core_it_is_written_for():
    requirements = _distribution("bnb-reference").requires
    core = import_module("bnb_core").__version__
    pins = [re.fullmatch(r"bnb-core(<|>=)([\d.]+),(<|>=)([\d.]+)", requirement) for requirement in requirements]
    assert any(pin is not None for pin in pins), requirements
    assert core.startswith("0.1")


def test_core_has_no_backend_among_its_requirements():
    required = [requirement for requirement in _distribution("bnb-core").requires if "extra ==" not in requirement]
    assert not [requirement for requirement in required if requirement.startswith("bnb-")]


def test_core_is_typed():
    assert (Path(import_module("bnb_core").__file__).parent / "py.typed").exists()
