"""What becomes of each installed plugin: found, loaded, refused, and how that is said."""

import importlib
import logging
import sys

import pytest
import torch

from bnb_core import backends
from bnb_core.backends import State, discovery, hardware
from bnb_core.errors import (
    BackendDefinitionError,
    BackendLoadError,
    BackendNotFoundError,
    BackendUnavailableError,
)


def only_entry():
    (entry,) = backends.list_backends()
    return entry


def logged(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level and record.name == "bnb_core.backends"]


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.DEBUG, logger="bnb_core.backends")


# ------------------------------------------------------------------------------------------------------------------------- finding


def test_nothing_installed_is_an_error_at_the_first_op(site, ran):
    assert backends.list_backends() == ()
    with pytest.raises(BackendNotFoundError, match=r"^no backend installed; pip install bnb-core\[reference\]$"):
        ran()


def test_listing_imports_nothing_and_does_not_depend_on_the_order_of_installation(site):
    explosive = "raise AssertionError('imported')"
    for name, distribution in [("zeta", "a-bnb"), ("beta", "z-bnb"), ("beta", "m-bnb"), ("alpha", "k-bnb")]:
        site.plugin(name, distribution, source=explosive)
    listed = [(entry.name, entry.distribution) for entry in backends.list_backends()]
    assert listed == [("alpha", "k-bnb 1.0"), ("beta", "m-bnb 1.0"), ("beta", "z-bnb 1.0"), ("zeta", "a-bnb 1.0")]
    assert [str(entry.state) for entry in backends.list_backends()] == ["discovered", "discovered", "shadowed", "discovered"]


def test_a_backend_that_is_not_needed_is_not_imported(site, ran):
    site.plugin("quick", mark=3)
    site.plugin("slow", source="import time; time.sleep(60)")
    backends.set_backend("quick")
    assert ran() == 3
    assert "fake_slow_bnb" not in sys.modules
    assert "<slow from slow-bnb 1.0: discovered>" in map(repr, backends.list_backends())


def test_a_module_is_imported_and_asked_once(site, ran):
    site.plugin("once", mark=2, body="asked = []", available="asked.append(1) or YES")
    assert [ran(), ran(torch.float32, 128)] == [2, 2]
    assert backends.get_backend("once") is sys.modules["fake_once_bnb"].backend
    assert sys.modules["fake_once_bnb"].asked == [1]


def test_unreadable_metadata_hides_no_other_package(site, caplog):
    site.plugin("good")
    (site.package("bad-bytes") / "entry_points.txt").write_bytes(b"[bnb_core.backends]\nx = \xff\xfe\n")
    (site.plugin("nameless") / "METADATA").unlink()
    assert [entry.distribution for entry in backends.list_backends() if entry.name == "good"] == ["good-bnb 1.0"]
    assert backends.get_backend("nameless").name == "nameless"
    (message,) = discovery.registry.snapshot().unreadable
    assert "cannot be read: UnicodeDecodeError" in message
    assert logged(caplog, logging.INFO) == [message]


def test_a_distribution_that_is_seen_twice_counts_once(site, ran, tmp_path, monkeypatch):
    """As an editable install beside a regular one is; Python imports the first of them on the path."""
    site.plugin("twin", "twin-bnb", "2.0", mark=2)
    stale = site.path / "twin.bnb-1.0.dist-info"
    stale.mkdir()
    (stale / "METADATA").write_text("Metadata-Version: 2.1\nName: Twin.Bnb\nVersion: 1.0\n")
    (stale / "entry_points.txt").write_text("[bnb_core.backends]\ntwin = fake_twin_bnb\n")
    assert len(backends.list_backends()) == 1
    backends.set_backend("twin")
    assert ran() == 2


# ------------------------------------------------------------------------------------------------------------------ broken imports


BROKEN = 'raise OSError("libcudart.so.12: cannot open shared object file")'


def test_a_broken_backend_that_nobody_chose_is_reported_once_and_passed_over(site, add, ran, caplog):
    site.plugin("jetson", "bnb-cuda-jetson", "0.1", source=BROKEN)
    add("other", mark=4)
    assert [ran(), ran()] == [4, 4]
    backends.get_backend()
    assert logged(caplog, logging.WARNING) == [
        "backend 'jetson' (bnb-cuda-jetson 0.1) failed to import: OSError: libcudart.so.12: cannot open shared object file"
    ]
    (traced,) = [record for record in caplog.records if record.levelno == logging.DEBUG and record.exc_info]
    assert traced.exc_info[0] is OSError


def test_a_broken_backend_that_was_chosen_raises_from_its_cause(site, add):
    site.plugin("jetson", "bnb-cuda-jetson", "0.1", source=BROKEN)
    add("other")
    expected = r"^backend 'jetson' from bnb-cuda-jetson 0\.1 is broken: OSError: libcudart.so.12: cannot open shared object file$"
    for choose in (backends.set_backend, backends.get_backend, lambda name: backends.use_backend(name).__enter__()):
        with pytest.raises(BackendLoadError, match=expected) as caught:
            choose("jetson")
        assert isinstance(caught.value.__cause__, OSError)


def test_a_broken_last_resort_is_reported_too(site, add, ran, caplog):
    site.plugin("reference", "bnb-reference", source="import no_such_module")
    add("other", mark=4)
    backends.set_backend("other")
    assert [ran(), ran(blocksize=128)] == [4, 4]
    assert logged(caplog, logging.WARNING) == [
        "backend 'reference' (bnb-reference 1.0) failed to import: ModuleNotFoundError: No module named 'no_such_module'"
    ]


def test_ctrl_c_while_importing_passes_and_the_next_use_tries_again(site, monkeypatch):
    site.plugin("stubborn", source="import os\nif os.environ.get('INTERRUPT'): raise KeyboardInterrupt\n" + _minimal("stubborn"))
    monkeypatch.setenv("INTERRUPT", "1")
    with pytest.raises(KeyboardInterrupt):
        backends.get_backend("stubborn")
    assert only_entry().state is State.DISCOVERED
    monkeypatch.delenv("INTERRUPT")
    assert backends.get_backend("stubborn").name == "stubborn"


def _minimal(name, hook="bnb_backends", returns="[Backend({name!r}, api_version=(1, 0))]"):
    return (
        "from bnb_core.backends import Backend, Support, YES, hookimpl\n"
        f"@hookimpl\ndef {hook}():\n    return {returns.format(name=name)}\n"
    )


# --------------------------------------------------------------------------------------------------------------------- API version


@pytest.mark.parametrize(
    ("api_version", "reason"),
    [
        ((2, 0), "written for backend API 2.0, this bnb_core provides 1.0; upgrade bnb-core"),
        ((1, 1), "written for backend API 1.1, this bnb_core provides 1.0; upgrade bnb-core"),
        ((0, 9), "written for backend API 0.9, this bnb_core provides 1.0; upgrade acme-bnb"),
    ],
)
def test_another_api_version_is_incompatible(site, add, ran, caplog, api_version, reason):
    # The rest is as a later API may have it: it must not be looked at.
    body = '@backend.kernel("of_the_future", anything={})\ndef f(): pass'
    site.plugin("acme", "acme-bnb", "3.1", api_version=api_version, available="1 / 0", body=body)
    add("other", mark=4)
    assert ran() == 4
    assert logged(caplog, logging.WARNING) == [f"backend 'acme' (acme-bnb 3.1) is incompatible: {reason}"]
    with pytest.raises(BackendLoadError) as caught:
        backends.get_backend("acme")
    assert str(caught.value) == f"backend 'acme' from acme-bnb 3.1 is incompatible: {reason}"


# -------------------------------------------------------------------------------------------------------------------- availability


def test_unavailable_says_why_when_chosen_and_steps_aside_when_not(site, add, ran, caplog):
    site.plugin("sve", "acme-sve", available='Support(False, "CPU has no SVE (HWCAP 0x119fff)")')
    add("other", mark=4)
    assert ran() == 4
    assert logged(caplog, logging.WARNING) == []
    with pytest.raises(BackendUnavailableError) as caught:
        backends.get_backend("sve")
    assert str(caught.value) == "backend 'sve' from acme-sve 1.0 is unavailable: CPU has no SVE (HWCAP 0x119fff)"


def test_nothing_usable_lists_every_reason(site, ran):
    site.plugin("sve", available='Support(False, "CPU has no SVE")')
    site.plugin("torn", source="import no_such_module")
    with pytest.raises(BackendNotFoundError) as caught:
        ran()
    assert str(caught.value).splitlines() == [
        "no installed backend can run here; pip install bnb-core[reference]",
        "  sve (sve-bnb 1.0): unavailable, CPU has no SVE",
        "  torn (torn-bnb 1.0): broken, ModuleNotFoundError: No module named 'no_such_module'",
    ]


# --------------------------------------------------------------------------------------------------------- mistakes of the author


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (_minimal("acme", hook="bnb_backend"), "BackendDefinitionError: unknown hook 'bnb_backend'; did you mean 'bnb_backends'?"),
        (_minimal("acme", hook="bnb_xyzzy"), "unknown hook 'bnb_xyzzy'; the hooks are bnb_backends, bnb_codebooks"),
        (_minimal("acme", hook="bnb_fallback").replace("bnb_fallback()", "bnb_fallback(evnt)"), "bnb_fallback(evnt)"),
        (_minimal("acme").replace("@hookimpl\n", ""), "it implements no hook bnb_backends; is the function there, and decorated"),
        (_minimal("acme", returns="[42]"), "bnb_backends() returned 42; it must return Backend objects"),
        (_minimal("acme", returns="[]"), "provides no backend of that name (it provides none); give both the same name"),
        (_minimal("emca"), "entry point 'acme' provides no backend of that name (it provides 'emca'); give both the same name"),
        (
            _minimal("acme", returns="[Backend('acme', api_version=(1, 0), available=lambda: True)]"),
            "available() returned True; it must return YES or Support(False, reason)",
        ),
    ],
)
def test_a_mistake_in_a_plugin_makes_it_broken_and_is_named(site, source, reason):
    site.plugin("acme", source=source)
    with pytest.raises(BackendLoadError) as caught:
        backends.get_backend("acme")
    assert only_entry().state is State.BROKEN
    assert "backend 'acme' from acme-bnb 1.0 is broken: " in str(caught.value)
    assert reason in str(caught.value)


def test_a_hook_that_only_a_newer_core_knows_can_be_declared_optional(site):
    body = "@hookimpl(optionalhook=True)\ndef bnb_of_the_future(): pass"
    site.plugin("acme", body=body)
    assert backends.get_backend("acme").name == "acme"


@pytest.mark.parametrize(
    ("op", "signature", "reasons"),
    [
        ("dequantise_4bit", "x", ["no op named 'dequantise_4bit'; did you mean 'dequantize_4bit'?"]),
        (
            "quantize_4bit",
            "x, blocksize, *, out",
            ["quantize_4bit(x, blocksize, *, out)", "expected quantize_4bit(x, codebook, blocksize, *, out)"],
        ),
    ],
)
def test_a_mistake_in_a_kernel_breaks_the_plugin_where_it_is_decorated(site, caplog, add, ran, op, signature, reasons):
    body = f"""
        second = Backend("acme", api_version=(1, 0))

        @second.kernel({op!r}, devices={{"cpu"}}, dtypes={{torch.float32}})
        def f({signature}): pass
    """
    site.plugin("acme", body=body)
    add("other", mark=4)
    assert ran() == 4
    (warning,) = logged(caplog, logging.WARNING)
    for reason in reasons:
        assert reason in warning


# --------------------------------------------------------------------------------------------------------------------------- names


def test_two_packages_of_one_name_warn_when_found_and_raise_when_chosen(site, ran, caplog):
    site.plugin("acme", "zeta-bnb", mark=9)
    site.plugin("acme", "alpha-bnb", mark=1)
    assert ran() == 1
    assert logged(caplog, logging.WARNING) == [
        "backend 'acme' (zeta-bnb 1.0) is shadowed: alpha-bnb 1.0 provides a backend of the same name"
    ]
    assert "fake_zeta_bnb" not in sys.modules
    with pytest.raises(BackendLoadError, match=r"^2 packages provide backend 'acme': alpha-bnb 1\.0, zeta-bnb 1\.0; "):
        backends.set_backend("acme")


def test_the_name_reference_is_reserved(site, ran):
    site.plugin("reference", "aaa-impostor", mark=6, priority=99)
    with pytest.raises(BackendLoadError, match="is broken: the name 'reference' is reserved for bnb-reference"):
        backends.get_backend("reference")
    site.plugin("reference", "bnb_reference", mark=5)
    backends.refresh()
    assert ran() == 5
    assert backends.get_backend("reference") is sys.modules["fake_bnb_reference"].backend
    assert "fake_aaa_impostor" not in sys.modules


@pytest.mark.parametrize("name", ["Acme", "ac-me", "4bit"])
def test_a_bad_name_is_broken_without_an_import(site, caplog, add, ran, name):
    site.package("bad-bnb", entry_points=[f"{name} = bad_bnb"], bad_bnb="raise AssertionError('imported')")
    add("other", mark=4)
    assert ran() == 4
    assert logged(caplog, logging.WARNING) == [
        f"backend {name!r} (bad-bnb 1.0) is broken: the name {name!r} is not a lower-case identifier"
    ]


def test_disabled_backends_are_blocked_and_not_imported(site, add, ran, monkeypatch):
    site.plugin("acme", priority=99)
    site.plugin("evil", source="raise AssertionError('imported')")
    add("other", mark=4)
    monkeypatch.setenv("BNB_DISABLED_BACKENDS", " evil, acme ,")
    backends.refresh()
    assert ran() == 4
    with pytest.raises(BackendUnavailableError) as caught:
        backends.set_backend("acme")
    assert str(caught.value) == "backend 'acme' from acme-bnb 1.0 is blocked: disabled by BNB_DISABLED_BACKENDS=evil,acme"
    monkeypatch.delenv("BNB_DISABLED_BACKENDS")
    backends.refresh()
    assert backends.get_backend("acme").name == "acme"


# ------------------------------------------------------------------------------------------------------ registering and refreshing


def test_refresh_finds_what_was_installed_and_tries_again_what_was_broken(site):
    backends.list_backends()
    info = site.plugin("late", source="import no_such_module")
    assert backends.list_backends() == ()
    backends.refresh()
    with pytest.raises(BackendLoadError):
        backends.get_backend("late")
    (info.parent / "no_such_module.py").write_text("")
    (info.parent / "fake_late_bnb.py").write_text(_minimal("late"))
    importlib.invalidate_caches()
    with pytest.raises(BackendLoadError):
        backends.get_backend("late")
    backends.refresh()
    assert backends.get_backend("late").name == "late"


def test_registering_takes_the_place_of_an_installed_backend_without_a_warning(site, add, ran, caplog):
    site.plugin("acme", mark=1)
    assert ran() == 1
    add("acme", mark=2)
    assert ran() == 2
    backends.set_backend("acme")
    backends.set_backend()
    assert logged(caplog, logging.WARNING) == []
    backends.unregister("acme")
    assert ran() == 1
    with pytest.raises(BackendNotFoundError, match="no backend named 'acme' was registered"):
        backends.unregister("acme")


def test_a_registered_plugin_is_a_backend_or_has_a_name(site):
    class Plugin:
        @backends.hookimpl
        def bnb_backends(self):
            return [backends.Backend("mine", api_version=(1, 0))]

    backends.register(Plugin(), name="mine")
    assert backends.get_backend("mine").name == "mine"
    assert repr(only_entry()) == "<mine from this process: ready>"
    with pytest.raises(BackendDefinitionError, match="needs the backend's name"):
        backends.register(Plugin())


# ------------------------------------------------------------------------------------------------------------------------ hardware


def test_a_gpu_without_its_backend_is_mentioned_once(site, add, ran, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "NVIDIA_NODES", (str(tmp_path / "absent"), str(tmp_path)))
    backends.selection._inform_once.cache_clear()
    add("host", devices={"*"})
    ran()
    backends.refresh()
    ran()
    expected = "an NVIDIA GPU is present but no CUDA backend is installed; pip install bnb-cuda-jetson"
    assert logged(caplog, logging.INFO) == [expected]


def test_a_gpu_with_a_backend_for_it_or_no_gpu_is_not_mentioned(site, add, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "NVIDIA_NODES", (str(tmp_path),))
    gpu = add("gpu", devices={"cuda"})
    backends.get_backend("gpu")
    assert hardware.missing_backend(backends.list_backends()) == ""
    backends.unregister(gpu.name)
    site.plugin("jetson", source=BROKEN)  # it has a message of its own
    backends.refresh()
    assert hardware.missing_backend(backends.list_backends()) == ""
    monkeypatch.setattr(hardware, "NVIDIA_NODES", (str(tmp_path / "absent"),))
    assert hardware.missing_backend(()) == ""
