"""Who is asked to run an op: context, process, environment, priority; and what is said when that cannot be."""

import asyncio
import pickle
import threading

import pytest

from bnb_core import backends
from bnb_core.backends import Support, get_backend, set_backend, use_backend
from bnb_core.errors import BackendLoadError, BackendNotFoundError, BackendUnavailableError, ConfigurationError


@pytest.fixture(autouse=True)
def _three(site, add):
    add("low", mark=1, priority=1)
    add("mid", mark=2, priority=5)
    add("high", mark=3, priority=9)


@pytest.fixture
def environment(monkeypatch):
    def environment(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        backends.refresh()

    return environment


def test_priority_then_environment_then_process_then_context(ran, environment):
    assert ran() == 3
    environment(BNB_BACKEND="low")
    assert ran() == 1
    set_backend("mid")
    assert ran() == 2
    with use_backend("high"):
        assert ran() == 3
        with use_backend("low", "high"):
            assert ran() == 1
        assert ran() == 3
    assert ran() == 2
    set_backend()
    assert ran() == 1


def test_ties_in_priority_go_by_name(add, ran):
    add("zz", mark=8, priority=20)
    add("aa", mark=7, priority=20)
    assert ran() == 7
    assert get_backend().name == "aa"


def test_the_environment_is_read_again_only_at_refresh(ran, monkeypatch):
    monkeypatch.setenv("BNB_BACKEND", "low")
    backends.refresh()
    assert ran() == 1
    monkeypatch.setenv("BNB_BACKEND", "mid")
    assert ran() == 1
    backends.refresh()
    assert ran() == 2


@pytest.mark.parametrize("value", ["low,high", " low , high ", ",low,,high"])
def test_the_environment_lists_names_in_order(environment, value):
    environment(BNB_BACKEND=value)
    assert get_backend().name == "low"
    assert [backend.name for backend in backends.selection.current().chain("cpu")] == ["low", "high"]


def test_an_empty_variable_is_as_good_as_none(environment, ran):
    environment(BNB_BACKEND="", BNB_FALLBACK="", BNB_DISABLED_BACKENDS="")
    assert ran() == 3


def test_reference_follows_every_choice_unless_fallback_is_forbidden(add, environment):
    add("reference", mark=4, priority=0)

    def chain():
        return [backend.name for backend in backends.selection.current().chain("cpu")]

    assert chain() == ["high", "mid", "low", "reference"]
    with use_backend("mid"):
        assert chain() == ["mid", "reference"]
    with use_backend("reference", "mid"):
        assert chain() == ["reference", "mid"]
    environment(BNB_FALLBACK="never")
    assert chain() == ["high"]
    with use_backend("mid", "low"):
        assert chain() == ["mid", "low"]


@pytest.mark.parametrize("value", ["no", "NEVER", "warn,allow"])
def test_a_fallback_policy_that_does_not_exist_is_an_error(environment, ran, value):
    environment(BNB_FALLBACK=value)
    with pytest.raises(ConfigurationError) as caught:
        ran()
    assert str(caught.value) == f"BNB_FALLBACK={value!r} is not one of warn, allow, never; set one of these or unset it"


# -------------------------------------------------------------------------------------------------------------- names that fail


def test_an_unknown_name_is_answered_with_what_may_be_meant(environment, ran):
    message = "no backend named 'hihg'; did you mean 'high'? Installed: high, low, mid. Run `bnb doctor` for details."
    for choose in (get_backend, set_backend, lambda name: use_backend(name).__enter__()):
        with pytest.raises(BackendNotFoundError) as caught:
            choose("hihg")
        assert str(caught.value) == message
    environment(BNB_BACKEND="hihg")
    for use in (ran, get_backend):
        with pytest.raises(BackendNotFoundError) as caught:
            use()
        assert str(caught.value) == f"BNB_BACKEND='hihg': {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("neon", "backend 'neon' is not installed; pip install bnb-cpu-neon"),
        ("jetson", "backend 'jetson' is not installed; pip install bnb-cuda-jetson"),
        ("reference", "backend 'reference' is not installed; pip install bnb-core[reference]"),
        ("noen", "no backend named 'noen'; did you mean 'neon'? Installed: high, low, mid. Run `bnb doctor` for details."),
        ("HIGH", "no backend named 'HIGH'; did you mean 'high'? Installed: high, low, mid. Run `bnb doctor` for details."),
        ("xyzzy", "no backend named 'xyzzy'; Installed: high, low, mid. Run `bnb doctor` for details."),
    ],
)
def test_names_of_this_project_come_with_their_package(name, message):
    with pytest.raises(BackendNotFoundError) as caught:
        get_backend(name)
    assert str(caught.value) == message


def test_every_listed_backend_must_be_ready(add, environment, ran, site):
    add("absent", available=Support(False, "no such device"))
    environment(BNB_BACKEND="high,absent")
    with pytest.raises(
        BackendUnavailableError, match=r"^BNB_BACKEND='high,absent': backend 'absent' .* unavailable: no such device$"
    ):
        ran()
    site.plugin("torn", source="import no_such_module")
    environment(BNB_BACKEND="torn")
    with pytest.raises(BackendLoadError, match=r"^BNB_BACKEND='torn': backend 'torn' from torn-bnb 1\.0 is broken") as caught:
        ran()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_choice_that_fails_leaves_the_former_one(ran):
    set_backend("low")
    with pytest.raises(BackendNotFoundError):
        set_backend("mid", "xyzzy")
    assert ran() == 1


def test_a_choice_survives_refresh_and_fails_when_its_backend_is_gone(ran):
    set_backend("low")
    backends.refresh()
    assert ran() == 1
    backends.unregister("low")
    with pytest.raises(BackendNotFoundError, match=r"^no backend named 'low'"):
        ran()


def test_backends_can_be_passed_themselves_if_they_are_in_use(ran):
    with use_backend(get_backend("low")):
        assert ran() == 1
    stranger = backends.Backend("low", api_version=(1, 0))
    with pytest.raises(ConfigurationError, match=r"another backend is in use under this name; register\(\) yours first"):
        set_backend(stranger)


@pytest.mark.parametrize("arguments", [(["low", "mid"],), (None,), (3,)])
def test_what_is_no_name_is_refused(arguments):
    with pytest.raises(ConfigurationError, match="pass backend names one by one, such as use_backend"):
        use_backend(*arguments).__enter__()


def test_use_backend_needs_a_name():
    with pytest.raises(ConfigurationError, match=r"use_backend\(\) needs a backend name"):
        use_backend().__enter__()


# -------------------------------------------------------------------------------------------------------------- threads and tasks


def test_a_context_is_not_seen_by_other_threads(ran):
    seen = []
    set_backend("mid")
    with use_backend("low"):
        thread = threading.Thread(target=lambda: seen.append(ran()))
        thread.start()
        thread.join()
        assert ran() == 1
    assert seen == [2]


def test_each_task_has_its_own_context(ran):
    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0.01)
            return ran()

    async def both():
        return await asyncio.gather(task("low"), task("mid"))

    assert asyncio.run(both()) == [1, 2]


def test_an_exception_ends_the_context(ran):
    with pytest.raises(ZeroDivisionError), use_backend("low"):
        raise ZeroDivisionError
    assert ran() == 3


# ------------------------------------------------------------------------------------------------------------------------ pickling


def test_backends_are_pickled_by_name(site):
    backend = get_backend("mid")
    data = pickle.dumps(backend)
    assert pickle.loads(data) is backend
    backends.unregister("mid")
    with pytest.raises(BackendNotFoundError, match=r"no backend named 'mid'; .*Installed: high, low"):
        pickle.loads(data)
