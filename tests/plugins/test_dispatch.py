"""From a call to a kernel: plans, refusals, fallbacks and their counts, and the cost of all that."""

import dataclasses
import sys
import timeit

import pytest
import torch

from bnb_core import backends, ops
from bnb_core.backends import YES, Backend, BackendFallbackWarning, Fallback, Support, dispatch, fallbacks, use_backend
from bnb_core.errors import BackendDefinitionError, BackendNotFoundError, InvalidArgumentError, OpNotSupportedError
from bnb_core.ops.spec import OPS, Parameter

ALL = (torch.float32, torch.float16, torch.bfloat16)
ARGUMENTS = (torch.zeros(4), torch.zeros(16), 64)


@pytest.fixture(autouse=True)
def _hermetic(site):
    pass


@pytest.fixture
def policy(monkeypatch):
    def policy(value):
        monkeypatch.setenv("BNB_FALLBACK", value)
        backends.refresh()

    return policy


def resolve(op="quantize_4bit", arguments=ARGUMENTS, dtype=torch.float32):
    return dispatch.resolve(OPS[op], torch.device("cpu"), dtype, arguments)


# ----------------------------------------------------------------------------------------------------------------------- fallback


def test_a_fallback_is_warned_about_once_and_counted_each_time(add, ran):
    add("neon", mark=1)
    add("reference", mark=2, dtypes=ALL)
    backends.set_backend("neon")
    reason = "torch.bfloat16 not in ['torch.float32']"
    text = f"quantize_4bit on cpu bfloat16: neon -> reference ({reason})"
    with pytest.warns(BackendFallbackWarning) as caught:
        assert [ran(dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)] == [2, 1, 2, 2]
    assert [str(warning.message) for warning in caught] == [f"{text}; set BNB_FALLBACK=allow to silence this"]
    event = Fallback("quantize_4bit", "cpu", "bfloat16", "neon", "reference", reason)
    assert fallbacks() == {event: 3}
    assert str(event) == text
    with pytest.warns(BackendFallbackWarning, match="cpu float16"):
        ran(torch.float16)
    backends.reset_fallbacks()
    assert fallbacks() == {}
    with pytest.warns(BackendFallbackWarning):
        ran(torch.bfloat16)


def test_allow_is_silent_but_counts(add, ran, policy):
    add("neon", mark=1)
    add("reference", mark=2, dtypes=ALL)
    policy("allow")
    with use_backend("neon"):
        assert ran(torch.float16) == 2
    assert list(fallbacks().values()) == [1]


def test_never_says_who_was_tried_and_why_not(add, ran, monkeypatch, policy):
    add("neon", mark=1)
    add("reference", mark=2, dtypes=ALL)
    monkeypatch.setenv("BNB_BACKEND", "neon")
    policy("never")
    assert ran() == 1
    with pytest.raises(OpNotSupportedError) as caught:
        ran(torch.bfloat16)
    assert str(caught.value) == (
        "no backend can run quantize_4bit on cpu torch.bfloat16 (selected by BNB_BACKEND=neon):\n"
        "  neon: torch.bfloat16 not in ['torch.float32']"
    )
    assert fallbacks() == {}


def test_without_reference_too_every_refusal_is_listed(add, ran):
    add("first", when=lambda call: Support(call.blocksize > 64, "blocksize must be above 64"))
    backends.register(Backend("second", api_version=(1, 0)))
    with use_backend("second", "first"), pytest.raises(OpNotSupportedError) as caught:
        ran()
    assert str(caught.value).splitlines() == [
        "no backend can run quantize_4bit on cpu torch.float32 (selected by use_backend('second', 'first')):",
        "  second: does not implement it",
        "  first: blocksize must be above 64",
    ]


def test_going_along_a_list_that_was_asked_for_is_no_fallback(add, ran):
    add("neon", mark=1)
    add("other", mark=2, dtypes=ALL)
    add("careful", mark=3, dtypes=ALL, when=lambda call: YES)
    for second, mark in (("other", 2), ("careful", 3)):
        with use_backend("neon", second):
            assert ran(torch.float16) == mark
    assert fallbacks() == {}


def test_without_a_choice_the_next_in_priority_is_a_fallback(add, ran):
    add("neon", mark=1, priority=9)
    add("other", mark=2, priority=5, dtypes=ALL)
    with pytest.warns(BackendFallbackWarning, match="neon -> other"):
        assert ran(torch.float16) == 2


def test_backends_of_other_devices_are_not_preferred(add, ran):
    add("gpu", mark=1, priority=9, devices={"cuda"})
    add("host", mark=2)
    assert ran() == 2
    assert fallbacks() == {}
    backends.unregister("host")
    with pytest.raises(OpNotSupportedError, match=r"selected by priority.*\n  none has kernels for this device"):
        ran()


# --------------------------------------------------------------------------------------------------------------------- `when`


def test_when_decides_each_call_by_scalars_and_shapes(add, ran):
    seen = []

    def when(call):
        seen.append((tuple(call.x.shape), call.blocksize))
        return Support(call.blocksize % 128 == 0, "blocksize must be a multiple of 128")

    add("picky", mark=1, when=when)
    add("reference", mark=2)
    with use_backend("picky"):
        assert ran(blocksize=128) == 1
        with pytest.warns(BackendFallbackWarning, match=r"picky -> reference \(blocksize must be a multiple of 128\)"):
            assert ran(blocksize=64) == 2
        assert ran(blocksize=256) == 1
    assert seen == [((4,), 128), ((4,), 64), ((4,), 256)]


def test_the_preferred_backend_of_a_fallback_is_the_first_that_refused(add):
    add("one", priority=9, when=lambda call: Support(False, "not today"))
    add("two", priority=8, dtypes={torch.float16})
    add("three", priority=7)
    with pytest.warns(BackendFallbackWarning, match=r"one -> three \(not today\)"):
        assert resolve().backend.name == "three"


def test_when_must_answer_with_a_support(add):
    add("lax", when=lambda call: True)
    with pytest.raises(
        BackendDefinitionError, match="`when` of 'quantize_4bit' in backend 'lax' returned True; it must return YES"
    ):
        resolve()


def test_when_can_ask_only_for_the_ops_parameters(add):
    add("wrong", when=lambda call: Support(call.block_size > 0, "-"))
    with pytest.raises(AttributeError, match="the op has no parameter 'block_size'; it has x, codebook, blocksize"):
        resolve()


# ------------------------------------------------------------------------------------------------------------------------ kernels


def test_scratch_is_allocated_for_the_kernel_by_the_size_of_the_call():
    seen = []
    backend = Backend("acme", api_version=(1, 0))

    @backend.kernel("quantize_4bit", devices={"cpu"}, dtypes={torch.float32}, scratch=lambda call: 3 * call.x.numel())
    def quantize_4bit(x, codebook, blocksize, *, out, scratch):
        seen.append((scratch.dtype, tuple(scratch.shape), scratch.device.type))

    backends.register(backend)
    ops.quantize_4bit(*ARGUMENTS)
    assert seen == [(torch.uint8, (12,), "cpu")]


def test_a_kernel_that_raised_is_not_tried_again_elsewhere(add, ran):
    backend = Backend("fragile", api_version=(1, 0), priority=9)

    @backend.kernel("quantize_4bit", devices={"cpu"}, dtypes={torch.float32})
    def quantize_4bit(x, codebook, blocksize, *, out):
        raise NotImplementedError("half written")

    backends.register(backend)
    add("reference", mark=2)
    with pytest.raises(NotImplementedError) as caught:
        ran()
    assert str(caught.value) == "half written"
    assert fallbacks() == {}
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["quantize_4bit failed in backend 'fragile' (this process) on cpu"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
def test_the_note_names_the_installed_package(site, ran):
    body = "def fail(x, codebook, blocksize, *, out): 1 / 0\nobject.__setattr__(backend.kernels['quantize_4bit'], 'function', fail)"
    site.plugin("neon", "bnb-cpu-neon", "0.3.1", body=body)
    with pytest.raises(ZeroDivisionError) as caught:
        ran()
    assert caught.value.__notes__ == ["quantize_4bit failed in backend 'neon' (bnb-cpu-neon 0.3.1) on cpu"]


def test_kernels_never_see_empty_or_meta_tensors():
    empty = ops.quantize_4bit(torch.zeros(0, 3), torch.zeros(16), 64)
    meta = ops.quantize_4bit(torch.zeros(70, device="meta"), torch.zeros(16, device="meta"), 64)
    assert [tuple(out.shape) for out in (*empty, *meta)] == [(0,), (0,), (35,), (2,)]
    with pytest.raises(BackendNotFoundError):
        ops.quantize_4bit(*ARGUMENTS)


def test_a_mix_of_devices_is_refused_before_a_backend_is_looked_for():
    with pytest.raises(InvalidArgumentError, match="x on cpu, codebook on meta"):
        ops.quantize_4bit(torch.zeros(4), torch.zeros(16, device="meta"), 64)


# ---------------------------------------------------------------------------------------------------- a later minor version


@pytest.fixture
def grown(monkeypatch):
    """The op as API 1.1 might have it: with a parameter more."""
    spec = OPS["quantize_4bit"]
    wider = dataclasses.replace(spec, parameters=(*spec.parameters, Parameter("seed", "int", since=(1, 1), default=0)))
    monkeypatch.setattr(backends.api, "API_VERSION", (1, 1))
    monkeypatch.setattr(backends.api, "OPS", {**OPS, "quantize_4bit": wider})
    return wider


def test_an_older_kernel_runs_only_where_a_new_parameter_has_its_default(grown, add):
    old = add("old", priority=9)  # declares API 1.0
    new = Backend("new", api_version=(1, 1), priority=5)

    @new.kernel("quantize_4bit", devices={"cpu"}, dtypes={torch.float32})
    def quantize_4bit(x, codebook, blocksize, seed, *, out):
        pass

    backends.register(new)

    def chosen(seed):
        return dispatch.resolve(grown, torch.device("cpu"), torch.float32, (*ARGUMENTS, seed)).backend.name

    assert chosen(0) == "old"
    assert fallbacks() == {}
    with pytest.warns(BackendFallbackWarning, match=r"old -> new \(written for a backend API without 'seed'\)"):
        assert chosen(7) == "new"
    assert (old.kernels["quantize_4bit"].arity, new.kernels["quantize_4bit"].arity) == (3, 4)


def test_an_older_kernel_is_called_without_the_new_parameter(grown, add, monkeypatch):
    from bnb_core.ops import four_bit

    add("old", mark=6)
    monkeypatch.setattr(four_bit._quantize, "spec", grown)
    monkeypatch.setattr(four_bit._quantize, "meta", lambda *args: (((2,), torch.uint8), ((1,), torch.float32)))
    assert int(four_bit._quantize.run(*ARGUMENTS, 0)[1][0]) == 6
    with pytest.raises(OpNotSupportedError, match="old: written for a backend API without 'seed'"):
        four_bit._quantize.run(*ARGUMENTS, 7)


# ---------------------------------------------------------------------------------------------------------------------- observers


def test_the_hook_sees_each_kind_of_fallback_once_and_may_fail(site, add, ran, policy, caplog):
    body = """
        events = []

        @hookimpl
        def bnb_fallback(event):
            events.append(str(event))
    """
    site.plugin("neon", body=body, priority=9)
    site.plugin("clumsy", body="@hookimpl\ndef bnb_fallback(event): raise RuntimeError('oops')", priority=8)
    add("reference", mark=2, dtypes=ALL)
    policy("allow")
    assert [ran(torch.float16), ran(torch.float16)] == [2, 2]
    assert sys.modules["fake_neon_bnb"].events == [
        "quantize_4bit on cpu float16: neon -> reference (torch.float16 not in ['torch.float32'])"
    ]
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "hook bnb_fallback of backend 'clumsy' failed"


# --------------------------------------------------------------------------------------------------------------- the hot path


def test_the_plan_follows_what_is_registered_and_selected(add, ran):
    add("one", mark=1, priority=1)
    assert ran() == 1
    add("two", mark=2, priority=2)
    assert ran() == 2
    backends.unregister("two")
    assert ran() == 1


def test_a_plan_that_was_made_before_a_change_is_not_used_after_it(add, monkeypatch):
    """As when one thread resolves while another registers."""
    add("old")
    plan = dispatch.Plan

    def slow_plan(*args):
        made = plan(*args)
        monkeypatch.undo()
        backends.unregister("old")
        add("new")
        return made

    monkeypatch.setattr(dispatch, "Plan", slow_plan)
    assert resolve().backend.name == "old"
    assert resolve().backend.name == "new"


def test_resolving_again_uses_neither_pluggy_nor_the_registry(add, monkeypatch):
    add("one")
    resolve()
    monkeypatch.setitem(sys.modules, "pluggy", None)
    monkeypatch.setattr(backends.discovery.registry, "snapshot", None)
    assert resolve().backend.name == "one"


def test_resolving_again_costs_about_a_dictionary_look_up(add):
    add("one")
    spec, device, dtype = OPS["quantize_4bit"], torch.device("cpu"), torch.float32
    table = {(spec.name, device, dtype, None): None}

    def best(statement):
        return min(timeit.repeat(statement, number=2000, repeat=50))

    look_up = best(lambda: table.get((spec.name, device, dtype, None)))
    assert best(lambda: dispatch.resolve(spec, device, dtype, ARGUMENTS)) < 4 * look_up
