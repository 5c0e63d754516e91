"""The pytest plugin: its options, what it prints and writes, and that it leaves other test runs alone."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

#: A backend with one kernel, which refuses some calls; and one that is wrong.
PARTIAL = """
    import torch
    from bnb_core import backends
    from bnb_core.backends import Backend, Support

    partial, wrong = Backend("partial", api_version=(1, 0)), Backend("wrong", api_version=(1, 0))

    @partial.kernel("int8_matmul", devices={"cpu"}, dtypes={torch.int8}, when=lambda call: Support(len(call.a) != 5, "five rows"))
    def int8_matmul(a, b, *, out):
        out.copy_(a.int() @ b.int().t())

    @wrong.kernel("int8_matmul", devices={"cpu"}, dtypes={torch.int8})
    def int8_matmul(a, b, *, out):
        out.copy_(a.int() @ b.int().t() + 1)

    backends.register(partial)
    backends.register(wrong)
"""
#: What an author of a backend writes.
ONE_IMPORT = "from bnb_core.testing.conformance import *  # noqa: F403\n"


@pytest.fixture
def project(tmp_path):
    """An empty project; call it with arguments to run pytest there, with the backends above."""
    (tmp_path / "partial.py").write_text(textwrap.dedent(PARTIAL))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # or the tests would belong to a project that the folder lies in

    def run(*args, plugin="partial", **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("BNB_", "PYTEST_"))}
        path = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(("-p", plugin) if plugin else ()), *args]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout

    run.path = tmp_path
    return run


SUITE = ("--pyargs", "bnb_core.testing.conformance")
#: The module with a plain call of every op; collecting it alone is quicker.
PLAIN = ("--pyargs", "bnb_core.testing.conformance.test_every_op")


def test_other_runs_are_left_alone(project):
    (project.path / "test_other.py").write_text(
        "import sys\n\ndef test_nothing_large_is_loaded():\n"
        "    assert 'bnb_core.testing.plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'hypothesis', 'bnb_core.backends'} & set(sys.modules)\n"
    )
    status, output = project("-W", "error", "--strict-config", "--strict-markers", "-p", "no:hypothesispytest", plugin=None)
    assert status == 0, output
    assert "bnb:" not in output


def test_partial_backend(project):
    report = project.path / "report.json"
    status, output = project(
        *SUITE,
        *("--bnb-backend", "partial"),
        *("--bnb-report", str(report)),
        *("-k", "plain_call or (int8_matmul and 64)"),
        "-rs",
        BNB_BACKENDS="x",
    )
    assert status == 0, output
    assert "bnb backend: partial (this process; written for backend API 1.0) on cpu" in output
    assert "bnb environment: BNB_BACKENDS is set but unknown; did you mean BNB_BACKEND?" in output
    assert "partial does not implement gemm_4bit" in output
    assert "partial refuses int8_matmul: five rows" in output
    skipped = int(re.search(r"(\d+) skipped, \d+ deselected", output).group(1))
    summary = f"1 of 19 ops, 1 of 55 (op, dtype) pairs, 0 failures, {skipped} skipped"
    assert f"\npartial: {summary}\n" in output

    written = json.loads(report.read_text())
    results = written["backends"]["partial"]
    assert written["api_version"] == "1.0"
    assert (results["device"], results["summary"], results["failures"]) == ("cpu", summary, [])
    matmul = results["ops"]["int8_matmul"]["int8"]
    assert matmul["status"] == "passed"
    assert matmul["skipped"] == ["partial refuses int8_matmul: five rows"]
    assert results["ops"]["gemm_4bit"]["float32"]["status"] == "skipped"
    assert results["ops"]["gemm_4bit"]["float32"]["skipped"] == ["partial does not implement gemm_4bit"]


def test_one_in_so_many_cases(project):
    def tests(*options):
        status, output = project(*SUITE, "--bnb-backend", "partial", "-k", "test_int8_matmul", "--collect-only", "-q", *options)
        assert status == 0, output
        return [line.split("::")[1] for line in output.splitlines() if "::" in line]

    every, some, few = tests(), tests("--bnb-every", "10"), tests("--bnb-every", "1000")
    assert set(some) < set(every)
    assert {name.split("[")[0] for name in few} == {name.split("[")[0] for name in every}
    for options in (every, some, few):
        assert len(options) == len(set(options))
    of_matmul = [sum(name.startswith("test_int8_matmul[") for name in names) for names in (every, some, few)]
    assert of_matmul == [49, 5, 1]
    assert {name.split("-")[-1] for name in few} == {name.split("-")[-1] for name in every}  # of each dtype
    status, output = project(*PLAIN, "--bnb-backend", "partial", "--bnb-every", "0")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--bnb-every 0: give a number from 1 on" in output


def test_unknown_backend_is_an_error_before_any_test(project):
    status, output = project(*PLAIN, "--bnb-backend", "partail")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --bnb-backend partail: no backend named 'partail'; did you mean 'partial'?" in output


def test_suite_without_a_backend_says_how_to_name_one(project):
    status, output = project(*PLAIN, "-k", "int8_matmul and plain_call")
    assert status == 1, output
    assert "the conformance suite needs a backend; run pytest with --bnb-backend NAME" in output


def test_one_import_and_a_name_in_conftest(project):
    (project.path / "test_conformance.py").write_text(ONE_IMPORT + "\ndel test_two_callers_at_once\n")
    (project.path / "conftest.py").write_text(
        "import pytest\n\n@pytest.fixture(scope='session')\ndef bnb_backend_name():\n    return 'partial'\n"
    )
    selected = "int8_matmul-int8 and (plain_call or two_callers or each_code or same_bits)"
    status, output = project("-W", "error", "-k", selected, "-v", "--import-mode=importlib")
    assert status == 0, output
    assert "test_conformance.py::test_plain_call[int8_matmul-int8] PASSED" in output
    assert "two_callers" not in output
    assert "partial: 1 of 19 ops, 1 of 55 (op, dtype) pairs, 0 failures, 0 skipped" in output


def test_failure_in_the_authors_own_file_shows_the_values(project):
    (project.path / "test_conformance.py").write_text(ONE_IMPORT)
    status, output = project("--bnb-backend", "wrong", "-k", "int8_matmul-int8 and plain_call", "--tb=short")
    assert status == 1, output
    assert "AssertionError: product: 4096 of 4096 elements differ; the first is element 0:" in output
    assert "wrong: 0 of 19 ops, 0 of 55 (op, dtype) pairs, 1 failures, 0 skipped" in output


def test_results_come_from_worker_processes(project):
    pytest.importorskip("xdist")
    status, output = project(*PLAIN, "--bnb-backend", "partial", "-n", "1", "-k", "plain_call")
    assert status == 0, output
    assert "partial: 1 of 19 ops, 1 of 55 (op, dtype) pairs, 0 failures, 54 skipped" in output
