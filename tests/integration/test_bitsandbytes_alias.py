"""`import bitsandbytes` means bnb_core under `bnb run` and after `enable`, in child processes too."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bnb_core.integrations import bitsandbytes_alias

PAGE = Path(__file__).parents[2] / "docs" / "move-from-bitsandbytes.md"
MODULES = (
    *("functional", "nn", "nn.modules", "nn.parametrize", "autograd._functions", "utils", "cextension", "cuda_specs", "optim"),
    *(f"optim.{name}" for name in ("adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "optimizer", "rmsprop", "sgd")),
)
PUBLIC_NAMES = f"""
import importlib, json
names = {{}}
for name in {MODULES!r}:
    module = importlib.import_module("bitsandbytes." + name)
    public = {{key: value for key, value in vars(module).items() if not key.startswith("_")}}
    own = [key for key, value in public.items() if callable(value) and getattr(value, "__module__", "").startswith(module.__name__)]
    names[name] = [list(public), own]
print(json.dumps(names))
"""
REPORT = """
import importlib.metadata, importlib.util, json, multiprocessing, subprocess, sys

def where(*_):
    import bitsandbytes
    return bitsandbytes.__file__

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.map(where, [0])[0]
    child = subprocess.check_output([sys.executable, "-c", "import bitsandbytes; print(bitsandbytes.__file__, end='')"], text=True)
    print(json.dumps([where(), spawned, child, importlib.metadata.version("bitsandbytes"), sys.argv[1:]]))
"""
PACKAGE = os.path.join(bitsandbytes_alias.FOLDER, "bitsandbytes", "__init__.py")
real_is_installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "program.py"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def evaluate(bnb_run, script):
    """Run code that has `bnb`, the alias, and `core`, and return what it leaves in `result`."""

    def run(code):
        head = "import json, warnings\nimport torch\nimport bitsandbytes as bnb\nimport bnb_core as core\n"
        return json.loads(bnb_run(script(f"{head}{code}\nprint(json.dumps(result))\n")))

    return run


def test_script_and_its_children_import_the_alias(bnb_run, script):
    *files, version, arguments = json.loads(bnb_run(script(REPORT), "a", "--force", "--", "-m"))
    assert files == [PACKAGE] * 3
    assert version == "0.50.2"
    assert arguments == ["a", "--force", "--", "-m"]


def test_module(bnb_run):
    assert "Show backends" in bnb_run("-m", "bitsandbytes", "--help")


def test_command_on_the_path(bnb_run):
    assert bnb_run("env").count(f"PYTHONPATH={bitsandbytes_alias.FOLDER}") == 1


def test_torch_distributed(bnb_run, script):
    path = script(
        "import sys, bitsandbytes, torch.distributed as d\n"
        "d.init_process_group('gloo')\n"
        "sys.stdout.write(f'{d.get_rank()} {bitsandbytes.__file__}\\n')\n"  # at once, as the other process writes too
    )
    pytest.importorskip("torch.distributed")
    lines = bnb_run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", path).split("\n")
    assert sorted(filter(None, lines)) == [f"0 {PACKAGE}", f"1 {PACKAGE}"]


def test_neither_file_nor_command(script):
    command = [sys.executable, "-c", "from bnb_core.cli import main; main()", "run", "--force", "no-such-program"]
    done = subprocess.run(command, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 2
    assert "'no-such-program' is neither a file nor a command" in done.stderr.decode()


@real_is_installed
def test_refuses_where_the_real_one_is_installed():
    command = [sys.executable, "-c", "from bnb_core.cli import main; main()", "run", "-m", "this"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == b""
    assert "the real bitsandbytes is installed in " in done.stderr.decode()


def test_refuses_where_the_real_one_is_imported(run_program):
    code = (
        "import sys, types, importlib.machinery\n"
        "from bnb_core.integrations.bitsandbytes_alias import enable\n"
        "real = types.ModuleType('bitsandbytes')\n"
        "real.__spec__ = importlib.machinery.ModuleSpec('bitsandbytes', None, origin='/elsewhere/bitsandbytes/__init__.py')\n"
        "sys.modules['bitsandbytes'] = real\n"
        "try:\n    enable(force=True)\n"
        "except RuntimeError as error:\n    print(type(error).__name__, error)\n"
    )
    assert run_program(sys.executable, "-c", code).startswith(
        "InstalledBitsandbytesError the real bitsandbytes is imported already, from /elsewhere/bitsandbytes;"
    )


def test_enable_needs_no_torch_and_may_be_repeated(run_program):
    code = (
        "import os, sys\n"
        "from bnb_core.integrations.bitsandbytes_alias import FOLDER, enable\n"
        "enable(force=True)\n"
        "assert 'torch' not in sys.modules\n"
        "import bitsandbytes\n"
        "enable()\n"
        "assert sys.path[0] == FOLDER and sys.path.count(FOLDER) == 1\n"
        "assert os.environ['PYTHONPATH'].split(os.pathsep).count(FOLDER) == 1\n"
        "print(bitsandbytes.__file__)\n"
    )
    assert run_program(sys.executable, "-c", code).strip() == PACKAGE


@real_is_installed
@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside these tests")
def test_has_the_public_names_of_bitsandbytes_but_for_those_that_the_documentation_names(bnb_run, run_program, script):
    path = script(PUBLIC_NAMES)
    theirs, ours = json.loads(run_program(sys.executable, path)), json.loads(bnb_run(path))
    assert len(theirs["functional"][1]) > 30
    lacking = {f"{module}.{name}" for module in MODULES for name in set(theirs[module][1]) - set(ours[module][0])}
    documented = set(re.findall(r"`((?:cextension|cuda_specs)\.\w+)`", PAGE.read_text(encoding="utf-8")))
    assert lacking == documented


def test_objects_are_those_of_bnb_core(evaluate):
    code = """
result = [
    [name for name in core.nn.__all__ if getattr(bnb.nn, name) is not getattr(core.nn, name)],
    [name for name in core.nn.modules.__all__ if getattr(bnb.nn.modules, name) is not getattr(core.nn.modules, name)],
    [name for name in core.utils.__all__ if getattr(bnb.utils, name) is not getattr(core.utils, name)],
    [name for name in core.functional.__all__ if getattr(bnb.functional, name) is not getattr(core.functional, name)],
    bnb.matmul_4bit is core.matmul_4bit and bnb.MatmulLtState is core.MatmulLtState,
    bnb.optim.GlobalOptimManager is core.optim.GlobalOptimManager,
]
"""
    assert evaluate(code) == [[], [], [], [], True, True]


def test_features(evaluate):
    assert evaluate("result = [sorted(bnb.features), hasattr(bnb, 'feature')]") == [["multi_backend"], False]


def test_old_transformers_is_told_that_a_cpu_will_do(evaluate):
    code = """
import sys, types
old = sys.modules["transformers.integrations.bitsandbytes"] = types.ModuleType("transformers.integrations.bitsandbytes")
old.is_ipex_available = lambda: False
result = [old.is_ipex_available(), "multi_backend" in bnb.features and old.is_ipex_available()]
"""
    assert evaluate(code) == [False, True]


def test_optimizers_are_told_by_their_module(evaluate):
    code = """
import pickle
others = ("Optimizer", "GlobalOptimManager", "PytorchLARS")
classes = {name: getattr(bnb.optim, name) for name in core.optim.__all__ if name not in others}
result = [
    [name for name, cls in classes.items() if "bitsandbytes.optim" not in str(cls)],
    [name for name, cls in classes.items() if not issubclass(cls, getattr(core.optim, name))],
    [name for name, cls in classes.items() if pickle.loads(pickle.dumps(cls)) is not cls],
]
"""
    assert evaluate(code) == [[], [], []]


def test_an_optimizer_steps_as_that_of_bnb_core(evaluate):
    code = """
def train(optimizers):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = optimizers.PagedAdamW8bit([weight], lr=0.1)
    for _ in range(3):
        weight.square().sum().backward()
        optimizer.step()
    return weight

assert bnb.optim.PagedAdamW8bit is not core.optim.PagedAdamW8bit
result = torch.equal(train(bnb.optim), train(core.optim))
"""
    assert evaluate(code) is True


def test_handles_of_the_c_library_fail_when_they_are_called(evaluate):
    code = """
result = []
for function in (bnb.functional.lib.cdequantize_blockwise_fp32, bnb.functional.lib["cadam32bit_grad_fp32"], bnb.functional.igemm):
    try:
        function(1, 2)
    except core.errors.NotProvidedError as error:
        result.append(str(error))
"""
    first, second, third = evaluate(code)
    assert "bitsandbytes.functional.lib.cdequantize_blockwise_fp32 is not provided by bnb_core" in first
    assert "bitsandbytes.functional.lib.cadam32bit_grad_fp32" in second
    assert third == "bitsandbytes.functional.igemm is not provided by bnb_core; use int8_linear_matmul"


def test_helpers(evaluate):
    code = """
from torch import nn
F, U = bnb.functional, bnb.utils
model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False)))
model.add_module("lm_head", nn.Linear(5, 6))
old = model[0].weight
made = U.replace_linear(model, lambda k, n, bias: bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=True), copy_weights=True)
tensor = torch.zeros(2)
try:
    F.is_on_gpu([tensor, tensor.to("meta")])
except core.BnbError as error:
    mixed = str(error)
result = dict(
    packed=U.unpack_tensor_to_dict(U.pack_dict_to_tensor({"shape": [3, 4], "dtype": "float16"})),
    kinds=[type(module).__name__ for module in made.modules() if isinstance(module, nn.Linear)],
    same=made is model and model[0].weight.data_ptr() == old.data_ptr(),
    bias=model[1][0].bias,
    address=F.get_ptr(tensor).value == tensor.data_ptr() and F.get_ptr(None) is None,
    one_device=F.is_on_gpu([tensor, None, tensor]),
    mixed=mixed,
    formats=U.INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING[0],
)
"""
    assert evaluate(code) == {
        "packed": {"shape": [3, 4], "dtype": "float16"},
        "kinds": ["Linear8bitLt", "Linear8bitLt", "Linear"],
        "same": True,
        "bias": None,
        "address": True,
        "one_device": True,
        "mixed": "is_on_gpu: tensors are on cpu, meta; move them to one device",
        "formats": "row",
    }


def test_statistics_of_a_replaced_weight_come_back_from_the_module(evaluate):
    code = """
layer = bnb.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
x = torch.randn(2, 64)
expected = layer(x)
layer._parameters["weight"] = torch.nn.Parameter(layer.weight.data, requires_grad=False)
bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
result = [type(layer.weight).__name__, layer.weight.quant_state is layer.quant_state, torch.equal(layer(x), expected)]
"""
    assert evaluate(code) == ["Params4bit", True, True]
