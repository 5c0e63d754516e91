"""`bnb tune`: what it measures, shows and keeps, and what it says where there is nothing to tune."""

import inspect
import json
import time

import pytest
from click.testing import CliRunner

from bnb_core import backends
from bnb_core.backends import tuning
from bnb_core.backends.doctor import examine
from bnb_core.backends.tuning import Identity
from bnb_core.cli import main

#: A plugin with two kinds of calls; `{shapes}` and `{device}` of the hook show in their names.
HOOK = """
    from bnb_core.backends.tuning import Case, Identity, Tuning
    from bnb_core.errors import InvalidArgumentError

    @hookimpl
    def bnb_tune(device, shapes):
        if device not in (None, "acme:0"):
            raise InvalidArgumentError(f"there is no device {device!r}; there is acme:0")
        names = [f"{N}x{K}" for N, K in shapes] or ["small", "large"]
        times = {"small": {"slow": 9.0, "fast": 4.56}, "large": {"slow": 80.0, "fast": 90.0, "odd": 85.0}}
        cases = [Case(name, lambda name=name: times.get(name, {"slow": 1.0, "fast": 2.0})) for name in names]
        return Tuning(Identity("Acme One", {"driver": "1.2"}), cases)
"""
IDENTITY = Identity("Acme One", {"driver": "1.2"})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where tables are kept."""
    monkeypatch.setenv("BNB_TUNE_CACHE", str(tmp_path / "tables"))
    tuning.forget()
    return tmp_path / "tables"


@pytest.fixture
def acme(site):
    site.plugin("acme", body=HOOK)
    site.plugin("plain")
    backends.refresh()
    return site


@pytest.fixture
def bnb():
    # From click 8.2 on, what goes to stderr is always apart.
    runner = CliRunner(mix_stderr=False) if "mix_stderr" in inspect.signature(CliRunner).parameters else CliRunner()

    def bnb(*arguments):
        return runner.invoke(main, ["tune", *arguments])

    return bnb


def results(run):
    assert run.exit_code == 0, run.stderr
    (result,) = json.loads(run.stdout)
    return result


def test_a_table_with_the_times_of_each_path_and_the_one_that_is_chosen(acme, bnb):
    run = bnb()
    assert run.exit_code == 0
    lines = [line.split() for line in run.stdout.splitlines()]
    assert lines[0][:4] == ["acme", "on", "Acme", "One,"]
    assert ["call", "slow", "fast", "odd", "chosen"] in lines
    assert ["small", "9.0", "4.6", "fast"] in lines
    assert ["large", "80.0", "90.0", "85.0", "slow"] in lines
    file = tuning.table_file("acme", "Acme One")
    assert f"kept in {file}" in run.stdout
    assert tuning.read("acme", IDENTITY).fastest("large") == "slow"


def test_json(acme, bnb):
    result = results(bnb("--json"))
    assert result.pop("measured").startswith("20")
    assert result == {
        "backend": "acme",
        "device": "Acme One",
        "conditions": {"driver": "1.2"},
        "file": str(tuning.table_file("acme", "Acme One")),
        "cases": {
            "small": {"microseconds": {"slow": 9.0, "fast": 4.56}, "fastest": "fast"},
            "large": {"microseconds": {"slow": 80.0, "fast": 90.0, "odd": 85.0}, "fastest": "slow"},
        },
        "missing": [],
    }
    assert results(bnb("--show", "--json"))["cases"] == result["cases"]


def test_progress_is_no_part_of_the_result(acme, bnb):
    run = bnb("--json")
    assert "acme" in run.stderr
    assert json.loads(run.stdout)


def test_show_measures_nothing(acme, bnb, folder):
    run = bnb("--show")
    assert run.exit_code == 1
    assert "no times of backend 'acme' for Acme One" in run.stderr
    assert str(folder) in run.stderr
    bnb()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert "chosen" in bnb("--show").stdout
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_clear(acme, bnb):
    bnb()
    file = tuning.table_file("acme", "Acme One")
    assert bnb("--clear").stdout == f"deleted {file}\n"
    assert not file.exists()
    assert bnb("--clear").stdout == "acme: nothing was measured on Acme One\n"


def test_shapes_and_device_reach_the_backend(acme, bnb):
    assert list(results(bnb("--json", "--shape", "128x64", "--shape", "3X5", "--device", "acme:0"))["cases"]) == ["128x64", "3x5"]
    run = bnb("--device", "acme:7")
    assert run.exit_code == 1
    assert "Error: there is no device 'acme:7'; there is acme:0" in run.stderr


def test_what_there_was_no_time_for_is_named(acme, bnb, monkeypatch):
    def slow(*args):
        time.sleep(0.02)
        return real(*args)

    real = tuning._checked
    monkeypatch.setattr(tuning, "_checked", slow)
    assert results(bnb("--json", "--seconds", "0.03"))["missing"] == ["large"]
    assert "1 of 2 kinds of calls have not been measured" in bnb("--show").stdout
    assert results(bnb("--json", "--seconds", "0.03"))["missing"] == []  # the one that was left out came first


def test_what_could_not_be_kept_is_shown_all_the_same(acme, bnb, folder):
    folder.write_text("a file")
    run = bnb()
    assert run.exit_code == 1
    assert "4.6" in run.stdout
    assert "set BNB_TUNE_CACHE to a folder that can be" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend", "plain"], "there is no backend to tune here:\n  plain: has one way to run each call"),
        (["--backend", "acmee"], "no backend named 'acmee'; did you mean 'acme'?"),
        (["--shape", "4096"], "'4096' is not rows x columns of a weight, such as 4096x11008"),
        (["--shape", "0x5"], "'0x5' is not rows x columns"),
        (["--seconds", "0"], "0.0 is not in the range"),
        (["--show", "--clear"], "--show and --clear exclude each other"),
    ],
)
def test_mistakes(acme, bnb, arguments, text):
    run = bnb(*arguments)
    assert run.exit_code in (1, 2)
    assert text in run.stderr


def test_where_no_backend_can_be_tuned_each_has_its_reason(site, bnb):
    site.plugin("plain")
    site.plugin("far", available='Support(False, "it is elsewhere")', body=HOOK)
    site.plugin("torn", source="raise OSError('no library')")
    backends.refresh()
    run = bnb()
    assert run.exit_code == 1
    for line in (
        "far: unavailable, it is elsewhere",
        "plain: has one way to run each call",
        "torn: broken, OSError: no library",
        "pip install bnb-cuda-jetson",
    ):
        assert line in run.stderr


def test_without_any_backend(site, bnb):
    run = bnb()
    assert run.exit_code == 1
    assert "there is no backend to tune here: none is installed" in run.stderr


def test_a_hook_that_returns_something_else_is_an_error(site, bnb):
    site.plugin("acme", body="@hookimpl\ndef bnb_tune(device):\n    return 5\n")
    backends.refresh()
    assert "bnb_tune() of backend 'acme' returned 5; it must return a Tuning" in bnb().stderr


def test_the_doctor_says_whether_there_is_a_table(acme, bnb):
    def checks():
        return [(check.level, check.message) for check in examine().checks if check.message.startswith(("acme", "plain"))]

    ((level, message),) = checks()
    assert (level, message[:34]) == ("hint", "acme: not tuned for Acme One; `bnb")
    bnb()
    ((level, message),) = checks()
    assert level == "ok"
    assert message.startswith("acme: 2 kinds of calls tuned for Acme One, 20")
    assert message.endswith(str(tuning.table_file("acme", "Acme One")))


def test_a_hook_that_fails_does_not_spoil_the_doctor(site):
    site.plugin("acme", body="@hookimpl\ndef bnb_tune(device):\n    raise RuntimeError('no device')\n")
    backends.refresh()
    assert ("fail", "table of acme: RuntimeError: no device") in [(check.level, check.message) for check in examine().checks]
