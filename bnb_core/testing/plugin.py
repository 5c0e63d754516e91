"""The pytest plugin of the conformance suite: its options and its fixtures.

Every pytest run where bnb-core is installed loads it, so nothing large is imported before a conformance test asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List

import pytest

from bnb_core.testing.report import PROPERTY, Report

if TYPE_CHECKING:
    from bnb_core.testing.subject import KernelUnderTest, Subject

pytest.register_assert_rewrite("bnb_core.testing.conformance")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("bnb", "conformance of bnb_core backends")
    group.addoption("--bnb-backend", metavar="NAME", help="backend that the conformance suite tests")
    group.addoption("--bnb-device", metavar="TYPE", help="torch device type to test it on (default: cpu, if it has kernels for it)")
    group.addoption("--bnb-strict", action="store_true", help="fail, instead of skip, what the backend lacks or refuses")
    group.addoption("--bnb-every", metavar="N", type=int, default=1, help="run one in N of each test's cases for an op and dtype")
    group.addoption("--bnb-report", metavar="FILE", help="write what was shown for each op and dtype to FILE, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Look for the backend, so that a wrong name is an error at once, and start the report."""
    name = config.getoption("--bnb-backend")
    if name:
        from bnb_core.backends import get_backend
        from bnb_core.errors import BackendError

        try:
            get_backend(name)
        except BackendError as error:
            raise pytest.UsageError(f"--bnb-backend {name}: {error}") from error
    config.pluginmanager.register(Report(config), "bnb-report")


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Keep what `--bnb-every` asks for: of each conformance test some cases for each op and dtype, one at least."""
    every = config.getoption("--bnb-every")
    if every < 1:
        raise pytest.UsageError(f"--bnb-every {every}: give a number from 1 on")
    if every == 1:
        return
    cases: Dict[Any, List[pytest.Item]] = {}
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "bnb_op" in parameters:
            test = item.nodeid.split("[")[0]
            cases.setdefault((test, parameters["bnb_op"], parameters["bnb_dtype"]), []).append(item)
    # From the middle: the first cases are those of empty tensors.
    kept = {item for group in cases.values() for item in group[min(every, len(group)) // 2 :: every]}
    left_out = {item for group in cases.values() for item in group} - kept
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def bnb_backend_name(pytestconfig: pytest.Config) -> str:
    """Name of the backend under test: `--bnb-backend`. A conftest.py may override this fixture."""
    name = pytestconfig.getoption("--bnb-backend")
    if not name:
        pytest.fail("the conformance suite needs a backend; run pytest with --bnb-backend NAME", pytrace=False)
    return str(name)


@pytest.fixture
def bnb_subject(request: pytest.FixtureRequest, bnb_backend_name: str) -> "Subject":
    """The backend under test, on its device."""
    from bnb_core.testing.subject import Subject

    subject = Subject(bnb_backend_name, request.config.getoption("--bnb-device"), request.config.getoption("--bnb-strict"))
    request.node.user_properties.append((PROPERTY, [bnb_backend_name, subject.device.type, None, None]))
    return subject


@pytest.fixture
def bnb_kernel(request: pytest.FixtureRequest, bnb_subject: "Subject", bnb_op: str, bnb_dtype: str) -> "KernelUnderTest":
    """The backend's kernel for the op and dtype that `for_ops` gives the test. Skips the test where there is none."""
    request.node.user_properties.append((PROPERTY, [bnb_subject.backend.name, bnb_subject.device.type, bnb_op, bnb_dtype]))
    return bnb_subject.kernel(bnb_op, bnb_dtype)
