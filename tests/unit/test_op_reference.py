"""docs/op-reference.md says what the spec says."""

import importlib.util
from pathlib import Path

from bnb_core.ops.spec import OPS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date():
    specification = importlib.util.spec_from_file_location("generate_op_reference", DOCS / "generate_op_reference.py")
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    page = generator.PATH.read_text(encoding="utf-8")
    assert page == generator.render(), "run `python docs/generate_op_reference.py`"
    for op in OPS:
        assert f"## `{op}`" in page
