"""What `import bnb_core` costs, and what it leaves alone."""

import json
import subprocess
import sys

import pytest

HEAVY = ("bnb_core.backends", "bnb_reference", "pluggy", "click", "rich", "importlib_metadata")
SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import bnb_core
seconds = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
{more}
print(json.dumps([seconds, new, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""


def measure(more=""):
    result = subprocess.run([sys.executable, "-c", SCRIPT.format(more=more)], stdout=subprocess.PIPE, check=True, timeout=60)
    return json.loads(result.stdout)


def test_importing_is_quick_and_loads_no_backend():
    runs = [measure() for _ in range(3)]
    seconds, new, _, initialized = min(runs)
    assert seconds < 0.060
    assert [name for name in new if name.startswith(HEAVY)] == []
    assert not initialized


def test_importing_the_backends_package_loads_no_backend_and_no_command_line():
    _, _, new, initialized = measure("import bnb_core.backends; bnb_core.list_backends()")
    assert "bnb_core.backends" in new
    assert [name for name in new if name.startswith(("bnb_reference", "click", "rich"))] == []
    assert not initialized


def test_importing_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; import bnb_core.backends; print(bnb_core.__version__)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_public_names_are_listed_and_unknown_ones_are_not():
    import bnb_core

    assert {"backends", "use_backend", "__version__"} <= set(dir(bnb_core))
    with pytest.raises(AttributeError, match="module 'bnb_core' has no attribute 'xyzzy'"):
        _ = bnb_core.xyzzy
