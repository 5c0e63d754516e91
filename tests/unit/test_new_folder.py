"""`NewFolder`: one process at a time, and nothing but a complete folder in its place."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from bnb_core.errors import InvalidArgumentError, StorageError
from bnb_core.integrations.new_folder import NewFolder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("empty_before", [False, True])
def test_it_appears_when_it_is_published(tmp_path, empty_before):
    place = tmp_path / "parent" / "place"
    if empty_before:
        place.mkdir(parents=True)
    with NewFolder(place) as folder:
        folder.write_json("a.json", {"b": 1})
        assert folder.work == tmp_path / "parent" / "place.partial"
        assert not place.exists() or names(place) == []
        folder.publish()
    assert names(place) == ["a.json"]
    assert (place / "a.json").read_text() == '{\n  "b": 1\n}\n'
    assert names(tmp_path / "parent") == ["place"]


def test_what_is_not_published_stays_for_the_next(tmp_path):
    with NewFolder(tmp_path / "place") as folder:
        folder.write_json("a.json", {})
    assert names(tmp_path) == ["place.partial"]
    with NewFolder(tmp_path / "place") as folder:
        assert names(folder.work) == ["a.json"]
        folder.clear()
        assert names(folder.work) == []
    assert names(tmp_path) == []


@pytest.mark.parametrize("make", [lambda place: place.write_text(""), lambda place: (place / "below").mkdir(parents=True)])
def test_a_place_in_use_is_refused(tmp_path, make):
    make(tmp_path / "place")
    with pytest.raises(InvalidArgumentError, match="is not an empty folder"), NewFolder(tmp_path / "place"):
        pass
    assert names(tmp_path) == ["place"]


HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from bnb_core.integrations.new_folder import NewFolder
    with NewFolder(Path(sys.argv[1])) as folder:
        folder.write_json("a.json", {})
        print("ready", flush=True)
        time.sleep(600)
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has locks of its own")
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    place = tmp_path / "place"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"ready\n"
        for _ in range(2):
            with pytest.raises(StorageError, match=f"is being written by process {holder.pid}; wait until"), NewFolder(place):
                pass
        assert names(tmp_path) == ["place.lock", "place.partial"]
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with NewFolder(place) as folder:
        assert names(folder.work) == ["a.json"]
        with pytest.raises(StorageError, match=f"process {os.getpid()}"), NewFolder(place):
            pass
        folder.publish()
    assert names(tmp_path) == ["place"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has locks of its own")
def test_a_lock_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """A process may lock the file in the moment between another's removing and closing it."""
    import fcntl

    lock = tmp_path / "place.lock"
    locked = []

    def lock_what_is_then_removed(file, how):
        if not locked:
            lock.unlink()
        locked.append(file)

    monkeypatch.setattr(fcntl, "flock", lock_what_is_then_removed)
    with NewFolder(tmp_path / "place"):
        assert len(locked) == 2
        assert lock.read_text() == f"process {os.getpid()}"
