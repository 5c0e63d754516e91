"""Tables of what was measured: how they are made, kept and read, and what becomes of files that cannot be used."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnb_core import backends
from bnb_core.backends import tuning
from bnb_core.backends.tuning import Case, Identity, Table, Tuning
from bnb_core.errors import BackendDefinitionError, StorageError

IDENTITY = Identity("Acme One, 8 units", {"driver": "1.2", "package": "3.4"})
TIMES = {"small": {"slow": 9.0, "fast": 4.5}, "large": {"slow": 80.0, "fast": 90.0}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where tables are kept."""
    monkeypatch.setenv("BNB_TUNE_CACHE", str(tmp_path / "tables"))
    tuning.forget()
    return tmp_path / "tables"


def a_table(cases=TIMES, identity=IDENTITY):
    return Table("acme", identity, "2026-01-02T03:04:05+00:00", dict(cases))


def a_tuning(times=TIMES, measured=None):
    def measure(name):
        if measured is not None:
            measured.append(name)
        return times[name]

    return Tuning(IDENTITY, [Case(name, lambda name=name: measure(name)) for name in times])


# ------------------------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_read():
    file = tuning.write(a_table())
    found = tuning.read("acme", IDENTITY)
    assert found == a_table()
    assert found.file == file
    assert found.fastest("small") == "fast"
    assert found.fastest("large") == "slow"


def test_nothing_was_measured(folder):
    assert tuning.read("acme", IDENTITY) is None
    assert tuning.table("acme", IDENTITY) is None
    assert not folder.exists()


def test_devices_and_backends_have_files_of_their_own(folder):
    devices = ["Acme One, 8 units", "Acme One, 16 units", "Acme (One) 8 units", "../../etc/passwd", "Größe 8", "Größe 9", ""]
    files = {tuning.table_file(backend, device) for backend in ("acme", "other") for device in devices}
    assert len(files) == 2 * len(devices)
    assert {file.parent for file in files} == {folder}


def test_the_default_folder_is_the_user_s(monkeypatch, tmp_path):
    monkeypatch.delenv("BNB_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if sys.platform == "linux":
        assert tuning.cache_folder() == tmp_path / "cache" / "bnb-core" / "tune"
    monkeypatch.setenv("BNB_TUNE_CACHE", "~/tables")
    assert tuning.cache_folder() == Path.home() / "tables"


def test_a_table_is_read_once_and_again_after_refresh():
    tuning.write(a_table())
    first = tuning.table("acme", IDENTITY)
    assert tuning.table("acme", Identity(IDENTITY.device, dict(reversed(list(IDENTITY.conditions.items()))))) is first
    first.file.unlink()
    assert tuning.table("acme", IDENTITY) is first
    backends.refresh()
    assert tuning.table("acme", IDENTITY) is None


def test_a_new_table_takes_the_place_of_the_one_that_was_read():
    tuning.write(a_table())
    assert tuning.table("acme", IDENTITY).fastest("small") == "fast"
    tuning.write(a_table({"small": {"slow": 1.0, "fast": 2.0}}))
    assert tuning.table("acme", IDENTITY).fastest("small") == "slow"


def damaged(change):
    content = json.loads(tuning.write(a_table()).read_text())
    change(content)
    return json.dumps(content)


DAMAGES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "\x00\xff\x00",
    "a list": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "of another backend": lambda text: text.replace('"acme"', '"emca"'),
    "no times": lambda text: text.replace('"fast": 4.5', '"fast": null'),
    "a negative time": lambda text: text.replace("4.5", "-4.5"),
    "not a number": lambda text: text.replace("4.5", "NaN"),
    "words": lambda text: text.replace("4.5", '"soon"'),
    "a list of times": lambda text: text.replace('"cases": {', '"cases": [1], "other": {'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_passed_over_with_one_warning(damage, caplog):
    file = tuning.write(a_table())
    good = file.read_text()
    file.write_bytes(DAMAGES[damage](good).encode("latin-1"))
    assert file.read_text("latin-1") != good
    for _ in range(3):
        assert tuning.read("acme", IDENTITY) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(file) in record.getMessage()
    assert "run `bnb tune`" in record.getMessage()
    tuning.write(a_table())
    assert tuning.read("acme", IDENTITY) == a_table()


@pytest.mark.parametrize(
    ("conditions", "text"),
    [
        ({"driver": "1.3", "package": "3.4"}, "measured with driver 1.2 and not 1.3"),
        ({"driver": "1.2"}, "measured with package 3.4 and not unknown"),
        ({"driver": "1.2", "package": "3.4", "clock": "9"}, "measured with clock unknown and not 9"),
    ],
)
def test_a_table_of_other_versions_is_passed_over_with_one_warning(conditions, text, caplog):
    file = tuning.write(a_table())
    for _ in range(3):
        assert tuning.table("acme", Identity(IDENTITY.device, conditions)) is None
    (record,) = caplog.records
    assert text in record.getMessage()
    assert str(file) in record.getMessage()


def test_a_table_under_the_name_of_another_device_is_passed_over(caplog):
    file = tuning.write(a_table())
    other = Identity("Acme Two, 8 units", IDENTITY.conditions)
    file.rename(tuning.table_file("acme", other.device))
    assert tuning.read("acme", other) is None
    assert "measured with 'Acme One, 8 units', and the device is 'Acme Two, 8 units'" in caplog.text


def test_a_file_that_cannot_be_read_is_passed_over(folder, caplog):
    tuning.table_file("acme", IDENTITY.device).mkdir(parents=True)
    assert tuning.read("acme", IDENTITY) is None
    assert "it cannot be read" in caplog.text


def test_a_folder_that_cannot_be_made_is_an_error_that_says_what_to_set(folder):
    folder.write_text("a file")
    with pytest.raises(StorageError, match=r"cannot be written to .*; set BNB_TUNE_CACHE to a folder that can be"):
        tuning.write(a_table())


def test_a_write_that_fails_leaves_the_table_before_and_nothing_else(folder, monkeypatch):
    file = tuning.write(a_table())

    def full(*args):
        raise OSError(28, "No space left on device")

    for function in ("replace", "fdopen"):
        with monkeypatch.context() as context:
            context.setattr(os, function, full)
            with pytest.raises(StorageError, match="No space left on device"):
                tuning.write(a_table({"small": {"slow": 1.0}}))
        assert list(folder.iterdir()) == [file]
    assert tuning.read("acme", IDENTITY) == a_table()


def write_many(number):
    for _ in range(60):
        tuning.write(a_table({f"case {i}": {"slow": float(number), "fast": float(number)} for i in range(200)}))
        found = tuning.read("acme", IDENTITY)
        assert found is not None, "a table was seen half written"
        assert len({str(times) for times in found.cases.values()}) == 1, "two tables were mixed"


def test_processes_that_write_at_once_leave_one_whole_table(folder):
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['write_many'](int(sys.argv[2]))"
    command = [sys.executable, "-c", code, __file__]
    processes = [subprocess.Popen([*command, number]) for number in ("1", "2")]
    assert [process.wait() for process in processes] == [0, 0]
    assert [file.name for file in folder.iterdir()] == [tuning.table_file("acme", IDENTITY.device).name]


def test_clear():
    file = tuning.write(a_table())
    assert tuning.table("acme", IDENTITY) is not None
    assert tuning.clear("acme", IDENTITY.device) == file
    assert tuning.table("acme", IDENTITY) is None
    assert tuning.clear("acme", IDENTITY.device) is None


# --------------------------------------------------------------------------------------------------------------------- measuring


def test_measuring_all():
    steps = []
    table = tuning.measure("acme", a_tuning(), progress=steps.append)
    assert table.cases == TIMES
    assert table.identity == IDENTITY
    assert steps == [(0, 2, "small"), (1, 2, "large"), (2, 2, "")]
    assert tuning.missing(a_tuning(), table) == []


def test_no_case_begins_that_would_end_late(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def measure(took):
        now[0] += took
        return {"path": took}

    cases = [Case(f"case {number}", lambda took=took: measure(took)) for number, took in enumerate((2.0, 5.0, 1.0, 1.0, 1.0))]
    steps = []
    table = tuning.measure("acme", Tuning(IDENTITY, cases), 12.5, steps.append)
    assert list(table.cases) == ["case 0", "case 1", "case 2"]  # at 8 s, a fourth could take until 13
    assert steps[-1] == (3, 5, "")
    assert now[0] - 100 <= 12.5
    assert tuning.missing(Tuning(IDENTITY, cases), table) == ["case 3", "case 4"]


def test_what_was_measured_before_stays_and_what_was_not_comes_first():
    earlier = {"small": {"slow": 1.0}, "of another run": {"slow": 2.0}}
    tuning.write(a_table(earlier))
    measured = []
    table = tuning.measure("acme", a_tuning(measured=measured))
    assert measured == ["large", "small"]
    assert table.cases == {**TIMES, "of another run": {"slow": 2.0}}
    measured.clear()
    assert tuning.measure("acme", a_tuning(measured=measured), 0.0).cases == earlier
    assert measured == []


@pytest.mark.parametrize("times", [{}, {"slow": 0.0}, {"slow": -1.0}, {"slow": math.nan}, {"slow": math.inf}])
def test_times_that_are_none_are_refused(times):
    with pytest.raises(BackendDefinitionError, match=r"backend 'acme' measured .* for 'small'; each path needs a positive time"):
        tuning.measure("acme", a_tuning({"small": times}))
