"""`bnb doctor`: what it shows, its exit code, and that it survives whatever is broken."""

import json

import pytest
import torch
from click.testing import CliRunner

from bnb_core import backends
from bnb_core.backends import Support, hardware, self_test
from bnb_core.backends.doctor import Check, examine
from bnb_core.cli import main
from bnb_core.errors import BackendDefinitionError

CHECKS = """
    from bnb_core.backends.doctor import Check

    @hookimpl
    def bnb_doctor():
        return [Check("ok", "the driver is fine"), {more}]
"""


@pytest.fixture
def messages():
    def messages(report, level):
        return [check.message for check in report.checks if check.level == level]

    return messages


@pytest.fixture
def bnb():
    def bnb(*arguments):
        return CliRunner().invoke(main, ["doctor", *arguments])

    return bnb


@pytest.fixture
def choose(monkeypatch):
    def choose(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        backends.refresh()

    return choose


# ------------------------------------------------------------------------------------------------------------------------- content


def test_the_report_shows_versions_selection_backends_and_who_runs_what(site, choose):
    site.plugin("neon", "bnb-cpu-neon", "0.1.0", priority=50, description="'Cortex-A78AE'")
    site.plugin("reference", "bnb-reference", "0.1.0", priority=0)
    site.plugin("sve", available='Support(False, "CPU has no SVE")')
    site.plugin("acme", "acme-bnb", "3.1", api_version=(2, 0))
    choose(BNB_BACKEND="neon")
    report = examine()
    assert report.ready
    assert list(report.versions)[:4] == ["bnb-core", "backend API", "torch", "Python"]
    assert report.versions["torch"] == torch.__version__
    assert (report.selected, report.selected_by, report.fallback) == (["neon", "reference"], "BNB_BACKEND=neon", "warn")
    incompatible = "written for backend API 2.0, this bnb_core provides 1.0; upgrade bnb-core"
    assert [(row.name, row.state, row.distribution, row.priority, row.ops, row.notes) for row in report.backends] == [
        ("neon", "ready", "bnb-cpu-neon 0.1.0", 50, 1, "Cortex-A78AE"),
        ("reference", "ready", "bnb-reference 0.1.0", 0, 1, ""),
        ("sve", "unavailable", "sve-bnb 1.0", 20, 1, "CPU has no SVE"),
        ("acme", "incompatible", "acme-bnb 3.1", None, None, incompatible),
    ]
    assert report.ops["quantize_4bit"]["float32"].backend == "neon"
    nobody = report.ops["quantize_4bit"]["bfloat16"]
    assert nobody.backend is None
    assert nobody.refused["neon"] == "torch.bfloat16 not in ['torch.float32']"
    assert report.ops["gemm_4bit"]["float32"].refused == dict.fromkeys(("neon", "reference"), "does not implement it")


def test_the_table_is_that_of_the_device_that_was_asked_for(site, add, messages):
    add("host", priority=5, when=lambda call: Support(False, "never"))
    add("gpu", devices={"cuda"}, priority=9)
    on_host = examine().ops["quantize_4bit"]["float32"]
    assert (on_host.backend, on_host.conditional, on_host.refused) == ("host", True, {})
    on_gpu = examine("cuda:0").ops["quantize_4bit"]["float32"]
    assert (on_gpu.backend, on_gpu.conditional) == ("gpu", False)
    nowhere = examine("mps")
    assert not nowhere.ready
    assert "no backend here has kernels for mps" in messages(nowhere, "fail")
    assert any("device type at start of device string: gpu" in message for message in messages(examine("gpu"), "fail"))


def test_the_text_says_the_same(site, add, bnb, choose):
    site.plugin("torn", source="import no_such_module")
    add("host", priority=5, when=lambda call: Support(False, "never"))
    choose(BNB_BACKENDS="host", BNB_BACKEND="host")
    result = bnb()
    lines = [line.rstrip() for line in result.output.splitlines()]
    assert lines[1] == "selection   host   (BNB_BACKEND=host)   fallback: warn"
    assert [line.split() for line in lines if line.startswith("host")] == [["host", "ready", "this", "process", "5", "1/19"]]
    torn = next(line for line in lines if line.startswith("torn"))
    assert torn.endswith("-         -     ModuleNotFoundError: No module named 'no_such_module'")
    assert [line.split() for line in lines if line.startswith("quantize_4bit")] == [["quantize_4bit", "host*", "nobody", "nobody"]]
    assert "* calls that it refuses run on the next backend" in lines
    assert "warn    BNB_BACKENDS is set but unknown; did you mean BNB_BACKEND?" in lines
    assert "warn    backend 'torn' is broken; `bnb doctor -v torn` shows the traceback" in lines
    assert "Traceback" not in result.output


def test_square_brackets_are_text(site, bnb):
    assert bnb("-v").output.count("no backend installed; pip install bnb-core[reference]") == 2  # in the finding, and its traceback


@pytest.mark.parametrize(("arguments", "shown"), [(["-v"], ["first", "second"]), (["-v", "second"], ["second"]), ([], [])])
def test_tracebacks_are_shown_to_those_who_ask(site, bnb, arguments, shown):
    site.plugin("first", source="import no_first_module")
    site.plugin("second", source="import no_second_module")
    output = bnb(*arguments).output
    for name in ("first", "second"):
        assert (f"traceback of {name}:" in output) is (name in shown)
        assert (f"    import no_{name}_module" in output) is (name in shown)


def test_a_traceback_that_is_not_there_is_said_so(site, bnb):
    site.plugin("torn", source="import no_such_module")
    assert "no traceback of 'tron'; there are tracebacks of: torn" in bnb("-v", "tron").output


def test_json_holds_the_report_and_nothing_else_even_when_a_plugin_prints(elsewhere):
    elsewhere.plugin("noisy", body="print('hello from the plugin')")
    elsewhere.plugin("torn", source="import no_such_module")
    result = elsewhere.run("-m", "bnb_core", "--json", BNB_BACKEND="noisy", BNB_FALLBACK="never")
    assert result.returncode == 0
    report = json.loads(result.stdout)
    assert report["ready"] is True
    assert report["selected"] == ["noisy"]
    assert {"noisy": "ready", "torn": "broken"}.items() <= {row["name"]: row["state"] for row in report["backends"]}.items()
    assert report["ops"]["quantize_4bit"]["float32"] == {"backend": "noisy", "conditional": False, "refused": {}}
    assert "ModuleNotFoundError" in report["tracebacks"]["torn"]


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({}, 0, None),
        ({"BNB_BACKEND": "fine"}, 0, None),
        ({"BNB_BACKEND": "fien"}, 1, "BNB_BACKEND='fien': no backend named 'fien'; did you mean 'fine'?"),
        ({"BNB_BACKEND": "fine,torn"}, 1, "backend 'torn' from torn-bnb 1.0 is broken: ModuleNotFoundError"),
        ({"BNB_BACKEND": "neon"}, 1, "backend 'neon' is not installed; pip install bnb-cpu-neon"),
        ({"BNB_FALLBACK": "maybe"}, 1, "BNB_FALLBACK='maybe' is not one of warn, allow, never"),
        ({"BNB_DISABLED_BACKENDS": "fine"}, 1, "no installed backend can run here"),
    ],
)
def test_the_exit_code_says_whether_the_selection_can_be_used(site, bnb, choose, variables, code, message):
    site.plugin("fine")
    site.plugin("torn", source="import no_such_module")
    choose(**variables)
    result = bnb()
    assert result.exit_code == code
    assert (message or "fallback: warn") in result.output


# ------------------------------------------------------------------------------------------------------------------------ findings


def test_variables_that_nothing_reads_are_reported(site, choose, messages):
    site.plugin("acme")
    choose(BNB_ACME_TILES="4", BNB_NEON_FEATURES="baseline", BNB_FALBACK="never", BNB_XYZZY="1", BNB_DISABLED_BACKENDS="acne")
    assert messages(examine(), "warn") == [
        "BNB_FALBACK is set but unknown; did you mean BNB_FALLBACK?",
        "BNB_XYZZY is set but unknown; nothing here reads it",
        "BNB_DISABLED_BACKENDS names 'acne', which is not installed; did you mean 'acme'?",
    ]


def test_hardware_without_a_backend_is_a_hint(site, add, messages, monkeypatch, tmp_path):
    add("host")
    monkeypatch.setattr(hardware, "NVIDIA_NODES", (str(tmp_path),))
    expected = "an NVIDIA GPU is present but no CUDA backend is installed; pip install bnb-cuda-jetson"
    assert messages(examine(), "hint") == [expected]


def test_plugins_add_checks_of_their_own(site, messages):
    site.plugin("good", body=CHECKS.format(more="Check('warn', 'the fan is off')"))
    site.plugin("odd", body=CHECKS.format(more="'text'"))
    site.plugin("torn", body=CHECKS.format(more="1 / 0"))
    site.plugin("ending", body=CHECKS.format(more="exit(3)"))
    report = examine()
    assert report.ready
    assert messages(report, "ok") == ["good: the driver is fine", "odd: the driver is fine"]
    assert messages(report, "warn") == ["good: the fan is off"]
    assert messages(report, "fail") == [
        "checks of ending: SystemExit: 3",
        "checks of odd: BackendDefinitionError: bnb_doctor() returned 'text'; it must return Check objects",
        "checks of torn: ZeroDivisionError: division by zero",
    ]


def test_a_check_has_a_known_level():
    with pytest.raises(BackendDefinitionError, match="level 'bad' of a check is not one of ok, hint, warn, fail"):
        Check("bad", "")


SELF_TEST = """
    @backend.kernel("int8_matmul", devices={{"cpu"}}, dtypes={{torch.int8}})
    def int8_matmul(a, b, *, out):
        out.copy_(a.int() @ b.int().t() + {error})
"""


def test_the_self_test_runs_what_a_backend_has_and_fails_for_a_wrong_answer(site, choose, messages, monkeypatch):
    # `quantize_4bit` is tried first, and the small plugins of these tests only pretend to have it.
    monkeypatch.setattr(self_test, "CASES", [case for case in self_test.CASES if case[0] == "int8_matmul"])
    site.plugin("right", body=SELF_TEST.format(error=0))
    site.plugin("wrong", body=SELF_TEST.format(error=1))
    site.plugin("without")
    report = examine(self_test=True)
    assert report.ready is False  # it is among those that are selected by priority
    assert messages(report, "ok") == ["self-test of right: int8_matmul gives the known answer"]
    assert messages(report, "hint") == ["self-test of without: it has no op with a known answer here"]
    assert messages(report, "fail") == [
        "self-test of wrong: BackendError: int8_matmul on cpu gave [[-23, -123], [-126, 1]] instead of [[-24, -124], [-127, 0]]"
    ]
    choose(BNB_BACKEND="right")
    assert examine(self_test=True).ready is True


@pytest.mark.parametrize("op", ["dequantize_4bit", "quantize_4bit", "int8_matmul"])
def test_the_reference_gives_each_known_answer(op, monkeypatch):
    bnb_reference = pytest.importorskip("bnb_reference")
    backends.register(bnb_reference.backend)
    monkeypatch.setattr(self_test, "CASES", [case for case in self_test.CASES if case[0] == op])
    assert self_test.run(bnb_reference.backend) == op


# ----------------------------------------------------------------------------------------------------- everything is broken


@pytest.mark.parametrize(
    ("torch_module", "error"),
    [
        ("raise ImportError('no torch here')", "ImportError: no torch here"),
        ("raise OSError('libtorch.so: bad ELF')", "OSError: libtorch.so: bad ELF"),
        ("import sys; sys.exit(7)", "SystemExit: 7"),
    ],
)
def test_torch_cannot_be_imported(elsewhere, torch_module, error):
    (elsewhere.path / "torch.py").write_text(torch_module)
    elsewhere.plugin("acme")
    result = elsewhere.run("-m", "bnb_core", BNB_BACKEND="acme")
    assert result.returncode == 1
    assert "torch cannot be imported" in result.stdout.splitlines()[0]
    assert f"torch: {error}" in result.stdout
    assert f"BNB_BACKEND='acme': backend 'acme' from acme-bnb 1.0 is broken: {error}" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("source", ["import sys; sys.exit(3)", "raise BaseException('garbage')", "raise GeneratorExit", "\0", "]]"])
def test_a_plugin_raises_whatever(elsewhere, source):
    (elsewhere.path / "torch.py").write_text("__version__ = '0'\ndef device(name): pass")  # for speed
    elsewhere.plugin("rude", source=source)
    result = elsewhere.run("-m", "bnb_core", "--json")
    row = next(row for row in json.loads(result.stdout)["backends"] if row["name"] == "rude")
    assert row["state"] == "broken"
    assert row["notes"]


def test_metadata_that_cannot_be_read(elsewhere):
    (elsewhere.path / "torch.py").write_text("__version__ = '0'\ndef device(name): pass")
    (elsewhere.package("garbled") / "entry_points.txt").write_bytes(b"[bnb_core.backends]\n\xff\n")
    result = elsewhere.run("-m", "bnb_core", "--json")
    messages = [check["message"] for check in json.loads(result.stdout)["checks"] if check["level"] == "warn"]
    assert any("cannot be read: UnicodeDecodeError" in message for message in messages)


def test_a_section_that_fails_leaves_the_others(site, add, monkeypatch, messages):
    add("fine")

    def fail(*args):
        raise RuntimeError("no such thing")

    for section in ("snapshot", "entries"):
        with monkeypatch.context() as patch:
            patch.setattr(backends.discovery.registry, section, fail)
            report = examine()
        assert "backends: RuntimeError: no such thing" in messages(report, "fail")
        assert report.versions["torch"] == torch.__version__
        assert not report.ready
    assert examine().ready


def test_a_description_that_fails_is_a_finding(site, messages):
    site.plugin("moody", description="1 / 0")
    report = examine()
    assert report.ready
    assert messages(report, "fail") == ["description of moody: ZeroDivisionError: division by zero"]


def test_ctrl_c_ends_it(site):
    site.plugin("slow", source="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        examine()


def test_it_is_also_the_modules_own_command(elsewhere):
    (elsewhere.path / "torch.py").write_text("__version__ = '0'\ndef device(name): pass")
    result = elsewhere.run("-m", "bnb_core", "--help")
    assert result.stdout.startswith("Usage: python -m bnb_core [OPTIONS]")
