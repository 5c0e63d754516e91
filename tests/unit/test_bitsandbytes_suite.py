"""The list of bitsandbytes' tests that cannot pass here: what it does to tests, and that its page says the same."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "bitsandbytes-test-suite.md"


@pytest.fixture
def suite():
    spec = importlib.util.spec_from_file_location("bitsandbytes_suite", ROOT / "tests" / "integration" / "bitsandbytes_suite.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside these tests")
def test_page_has_the_same_tests_and_reasons(suite):
    rows = [line for line in PAGE.read_text(encoding="utf-8").split("\n") if line.startswith("| `test_") and line.count("|") == 3]
    known = [f"| `{test}`{f', `{part}`' if part else ''} | {reason} |" for test, part, reason in suite.KNOWN]
    assert rows == known + [f"| `{name}` | {reason} |" for name, reason in suite.LEFT_OUT.items()]


class _Item:
    def __init__(self, nodeid):
        self.nodeid = nodeid
        self.markers = []

    def add_marker(self, marker):
        self.markers.append(marker.mark)


def test_known_failures_are_marked_and_no_others(suite):
    known = [
        "tests/test_optim.py::test_optimizer32bit[dim2=32-opt=lars]",
        "tests/test_modules.py::test_linear_kbit_fp32_bias[NF4-cpu]",
        "tests/test_modules.py::test_embedding_not_implemented_error",
    ]
    others = [
        "tests/test_optim.py::test_optimizer32bit[dim2=32-opt=lion]",
        "tests/test_optim.py::test_optimizer32bit",
        "tests/test_ops.py::TestLLMInt8Ops::test_int8_mm_dequant[cpu]",
    ]
    items = [_Item(nodeid) for nodeid in known + others]
    suite.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items if item.markers] == known
    assert all(marker.kwargs["strict"] and marker.name == "xfail" for item in items for marker in item.markers)


def test_files_that_cannot_be_imported_are_left_out(suite):
    assert suite.pytest_ignore_collect(Path("tests/test_cuda_setup_evaluator.py")) is True
    assert suite.pytest_ignore_collect(Path("tests/test_optim.py")) is None
