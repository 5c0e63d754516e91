"""First use from many threads, forks at a bad time, and plugins that come back while they are being imported."""

import os
import sys
import threading

import pytest

from bnb_core import backends
from bnb_core.backends import State, get_backend
from bnb_core.errors import BackendLoadError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")


def test_many_threads_at_first_use_import_a_plugin_once(site, ran):
    site.plugin("slow", mark=5, body="import time; time.sleep(0.2); asked = []", available="asked.append(1) or YES")
    ready = threading.Barrier(8)
    results = []

    def use():
        ready.wait()
        results.append(ran())

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [5] * 8
    assert sys.modules["fake_slow_bnb"].asked == [1]


def test_threads_may_load_different_plugins_at_once(site):
    """No common lock: each of these imports ends only after the other has begun."""
    site.package("meeting", meeting="import threading\nplace = threading.Barrier(2, timeout=10)")
    for name in ("left", "right"):
        site.plugin(name, body="import meeting\nmeeting.place.wait()")
    threads = [threading.Thread(target=get_backend, args=(name,)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(entry.state) for entry in backends.list_backends()] == ["ready", "ready"]


@pytest.mark.parametrize("use", ["backends.get_backend('acme')", "backends.get_backend()", "backends.set_backend('acme')"])
def test_a_plugin_that_uses_itself_while_being_imported_is_told_so(site, use):
    site.plugin("acme", body=f"from bnb_core import backends\n{use}")
    with pytest.raises(BackendLoadError) as caught:
        get_backend("acme")
    assert str(caught.value) == (
        "backend 'acme' from acme-bnb 1.0 is broken: BackendLoadError: backend 'acme' from acme-bnb 1.0 was used while it is "
        "being imported; move that use out of the plugin's module level"
    )


def test_a_plugin_may_use_another_while_being_imported(site):
    site.plugin("base")
    site.plugin("derived", body="from bnb_core import backends\nassert backends.get_backend('base').name == 'base'")
    assert get_backend("derived").name == "derived"
    assert {entry.state for entry in backends.list_backends()} == {State.READY}


# ---------------------------------------------------------------------------------------------------------------------------- fork

FORK = """
import os, sys, threading, time
import torch
from bnb_core import backends
from bnb_core.backends import discovery, dispatch

if __name__ == "__main__":
    {before}
    pid = os.fork()
    if pid == 0:
        import faulthandler
        faulthandler.dump_traceback_later(20, exit=True)
        {child}
        sys.stdout.flush()
        os._exit(0)
    {parent}
    sys.exit(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))
"""


def fork(site, child, before="", parent=""):
    def indented(text, depth):
        return ("\n" + " " * depth).join(text.strip().splitlines())

    script = site.path / "fork_script.py"
    script.write_text(FORK.format(before=indented(before, 4), child=indented(child, 8), parent=indented(parent, 4)))
    result = site.run("-W", "ignore", str(script))
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_fork
def test_a_fork_while_other_threads_hold_the_locks_leaves_the_child_usable(elsewhere):
    elsewhere.plugin("acme")
    held = """
entry = next(entry for entry in backends.list_backends() if entry.name == "acme")
locks = [discovery.registry._lock, dispatch._lock, entry._lock]
def hold():
    for lock in locks: lock.acquire()
    taken.set()
    time.sleep(3)
taken = threading.Event()
threading.Thread(target=hold, daemon=True).start()
taken.wait()
"""
    child = """
print(backends.get_backend("acme").name, backends.fallbacks())
backends.refresh()
print(backends.get_backend("acme").name)
"""
    assert fork(elsewhere, child, before=held).split() == ["acme", "{}", "acme"]


@needs_fork
def test_a_fork_while_another_thread_imports_a_backend_is_an_error_in_the_child_and_no_hang(elsewhere):
    elsewhere.plugin("slow", body="import time; time.sleep(1.5)")
    before = """
thread = threading.Thread(target=backends.get_backend, args=("slow",))
thread.start()
while "fake_slow_bnb" not in sys.modules: time.sleep(0.01)
"""
    child = """
try:
    backends.get_backend("slow")
except Exception as error:
    print(type(error).__name__, error)
"""
    parent = """
thread.join()
print(backends.get_backend("slow").name)
"""
    lines = fork(elsewhere, child, before=before, parent=parent).splitlines()
    assert sorted(lines) == [
        "BackendLoadError backend 'slow' from slow-bnb 1.0 is broken: another thread was loading it when this process was forked; "
        "load it earlier, or start processes with 'spawn'",
        "slow",
    ]


@needs_fork
def test_an_import_that_forks_goes_on_in_both_processes(elsewhere):
    elsewhere.plugin("forking", body="import os\npid = os.fork()")
    script = """
import os, sys
from bnb_core import backends
print(backends.get_backend("forking").name, flush=True)
pid = sys.modules["fake_forking_bnb"].pid
if pid: os.waitpid(pid, 0)
"""
    result = elsewhere.run("-W", "ignore", "-c", script)
    assert result.stdout.count("forking") == 2, result.stderr
