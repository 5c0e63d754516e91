"""What a backend may be made of: each mistake is an error where it is written, that says what is right."""

import dataclasses
import pickle

import pytest
import torch

from bnb_core.backends import YES, Backend, Support, api
from bnb_core.errors import BackendDefinitionError, BackendIncompatibleError
from bnb_core.ops.spec import OPS

F32 = {torch.float32}


@pytest.fixture
def backend():
    return Backend("acme", api_version=(1, 0), priority=3, description=lambda: "one device")


def good(x, codebook, blocksize, *, out):
    pass


def test_what_is_declared_can_be_read_without_running_anything(backend):
    assert backend.kernel("quantize_4bit", devices={"cpu"}, dtypes={torch.float32, torch.float16})(good) is good
    kernel = backend.kernels["quantize_4bit"]
    assert (kernel.function, kernel.devices, kernel.dtypes) == (good, {"cpu"}, {"float32", "float16"})
    assert (backend.priority, backend.description, repr(backend)) == (3, "one device", "<Backend 'acme': 1 of 19 ops>")
    with pytest.raises(TypeError):
        backend.kernels["quantize_4bit"] = None


def test_refusals_name_what_is_accepted(backend):
    backend.kernel("quantize_4bit", devices={"cpu"}, dtypes=F32)(good)
    kernel = backend.kernels["quantize_4bit"]
    assert kernel.refusal("cpu", "float32") == ""
    assert kernel.refusal("cpu", "bfloat16") == "torch.bfloat16 not in ['torch.float32']"
    assert kernel.refusal("cuda", "float32") == "cuda not in ['cpu']"


@pytest.mark.parametrize("name", ["Acme", "ac-me", "", None, 3])
def test_names_are_lower_case_identifiers(name):
    with pytest.raises(BackendDefinitionError, match="is not a lower-case identifier; choose one such as 'acme'"):
        Backend(name, api_version=(1, 0))


@pytest.mark.parametrize("api_version", ["1.0", 1, (1,), (1, 0, 0), ("1", "0"), [1, 0]])
def test_api_versions_are_pairs_of_numbers(api_version):
    with pytest.raises(BackendDefinitionError, match=r"it must be a pair such as \(1, 0\)"):
        Backend("acme", api_version=api_version)


def test_api_versions_are_accepted_up_to_the_one_provided(monkeypatch):
    monkeypatch.setattr(api, "API_VERSION", (2, 3))
    for version in [(2, 0), (2, 3)]:
        assert Backend("acme", api_version=version).api_version == version
    for version, outdated in [((2, 4), "bnb-core"), ((3, 0), "bnb-core"), ((1, 9), "the package of backend 'acme'")]:
        with pytest.raises(BackendIncompatibleError, match=f"this bnb_core provides 2.3; upgrade {outdated}$") as caught:
            Backend("acme", api_version=version)
        assert caught.value.api_version == version
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"op": "dequantise_4bit"}, "backend 'acme': no op named 'dequantise_4bit'; did you mean 'dequantize_4bit'?"),
        ({"op": "xyzzy"}, "no op named 'xyzzy'; the ops are quantize_blockwise, "),
        ({"dtypes": {torch.float64}}, "kernel for 'quantize_4bit' declares float64; the op has float32, float16, bfloat16"),
        ({"dtypes": set()}, "declares no dtype; the op has float32, float16, bfloat16"),
        ({"devices": "cpu"}, "has devices='cpu'; pass a set of device types, such as {'cpu'}"),
        ({"devices": []}, "has devices=[]; pass a set"),
    ],
)
def test_declarations_are_checked(backend, declared, message):
    arguments = {"op": "quantize_4bit", "devices": {"cpu"}, "dtypes": F32, **declared}
    with pytest.raises(BackendDefinitionError) as caught:
        backend.kernel(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x, code, blocksize, *, out: None, "(x, code, blocksize, *, out)"),
        (lambda codebook, x, blocksize, *, out: None, "(codebook, x, blocksize, *, out)"),
        (lambda x, codebook, blocksize, out: None, "(x, codebook, blocksize, out)"),
        (lambda x, codebook, blocksize, *, out, scratch: None, "(x, codebook, blocksize, *, out, scratch)"),
        (lambda *args, out: None, "(*args, out)"),
        (lambda x, codebook, blocksize, *, out, **rest: None, "(x, codebook, blocksize, *, out, **rest)"),
    ],
)
def test_parameters_must_be_the_ops(backend, function, found):
    with pytest.raises(BackendDefinitionError) as caught:
        backend.kernel("quantize_4bit", devices={"cpu"}, dtypes=F32)(function)
    assert f"quantize_4bit{found}, expected quantize_4bit(x, codebook, blocksize, *, out)" in str(caught.value)
    assert not backend.kernels


def test_parameters_leave_out_what_the_output_says_and_follow_scratch(backend):
    @backend.kernel("dequantize_4bit", devices={"cpu"}, dtypes=F32, scratch=lambda call: 8)
    def with_scratch(packed, absmax, codebook, blocksize, nested, *, scratch, out):
        pass

    assert backend.kernels["dequantize_4bit"].arity == 5
    with pytest.raises(BackendDefinitionError, match=r"expected optimizer_step_32bit_.*step, lr\)$"):
        backend.kernel("optimizer_step_32bit_", devices={"cpu"}, dtypes=F32)(lambda params, grads: None)


def test_a_signature_that_cannot_be_read_needs_a_wrapper(backend):
    class Native:  # as some extension modules' functions are
        __signature__ = 3

        def __call__(self):
            pass

    with pytest.raises(BackendDefinitionError, match="cannot be read; wrap it in a Python function"):
        backend.kernel("quantize_4bit", devices={"cpu"}, dtypes=F32)(Native())


def test_an_op_has_one_kernel(backend):
    backend.kernel("quantize_4bit", devices={"cpu"}, dtypes=F32)(good)
    with pytest.raises(BackendDefinitionError, match="backend 'acme' has two kernels for 'quantize_4bit'; keep one"):
        backend.kernel("quantize_4bit", devices={"cuda"}, dtypes=F32)


def test_an_op_that_is_newer_than_the_declared_api_is_refused(backend, monkeypatch):
    newer = dataclasses.replace(OPS["quantize_4bit"], name="quantize_2bit", since=(1, 1))
    monkeypatch.setattr(api, "OPS", {**OPS, "quantize_2bit": newer})
    with pytest.raises(BackendDefinitionError, match=r"op 'quantize_2bit' needs api_version=\(1, 1\)"):
        backend.kernel("quantize_2bit", devices={"cpu"}, dtypes=F32)


def test_a_refusal_has_a_reason():
    assert YES
    assert Support(True)
    assert not Support(False, "why")
    with pytest.raises(BackendDefinitionError, match="a refusal needs a reason"):
        Support(False)
