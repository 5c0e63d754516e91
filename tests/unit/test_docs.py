"""The documentation names whatever users and authors of backends can set or implement."""

import inspect
from pathlib import Path

import pytest

from bnb_core.backends import State, environment, hookspecs

DOCS = Path(__file__).resolve().parents[2] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not beside these tests")
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("bnb_")}


@pytest.fixture(scope="module")
def text():
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))


@pytest.mark.parametrize("variable", environment.VARIABLES)
def test_every_variable_is_documented(text, variable):
    assert f"`{variable}`" in text or f"{variable}=" in text, f"missing from the documentation: {variable}"


@pytest.mark.parametrize("policy", environment.FALLBACK_POLICIES)
def test_every_fallback_policy_is_documented(text, policy):
    assert f"`{policy}`" in text, f"missing from the documentation: BNB_FALLBACK={policy}"


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_its_arguments(text, name):
    call = f"{name}({', '.join(inspect.signature(HOOKS[name]).parameters)})"
    assert f"`{call}`" in text, f"missing from the documentation of hooks: {call}"


@pytest.mark.parametrize("state", [state.value for state in State if state is not State.LOADING])
def test_every_state_is_documented(text, state):
    assert f"`{state}`" in text, f"missing from the documentation: the state {state}"
