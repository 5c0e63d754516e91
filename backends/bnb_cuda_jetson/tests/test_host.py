"""The host code, against a driver that writes down what it is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from bnb_cuda_jetson import _native

ARCHITECTURES = _native.architectures()
#: A device that this build has code for.
CAPABILITY = ARCHITECTURES[0]

DEQUANTIZE = "_native.dequantize_4bit({device}, {stream}, {out}, 1, {n}, 1024, 2048, 4096, 64, 0, 0, 0, 1)\n"


def dequantize(device: int = 0, stream: int = 0, out: int = 256, n: int = 1 << 20) -> str:
    return DEQUANTIZE.format(device=device, stream=stream, out=out, n=n)


def caught(code: str) -> str:
    return f"try:\n    {code}except Exception as error:\n    print(type(error).__name__, error)\n"


def test_without_a_driver_the_package_imports_and_says_why_it_cannot_run():
    code = "from bnb_cuda_jetson import _native, backend\nprint(backend.available())\nprint(backend.description)\n" + caught(
        dequantize()
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "Support(ok=True" in result.stdout:
        pytest.skip("this machine has a driver")
    assert result.returncode == 0, result.stderr
    support, description, error = result.stdout.splitlines()
    assert support.startswith("Support(ok=False, reason='no NVIDIA driver: libcuda.so.1")
    assert "install the driver, which a Jetson has with JetPack" in support
    assert description.startswith("no CUDA device; device code for sm_")
    assert error.startswith("BackendUnavailableError no NVIDIA driver: libcuda.so.1")


def test_without_a_driver_the_doctor_says_what_is_missing_and_where_it_comes_from():
    code = "from bnb_core.backends import register\nfrom bnb_core.cli import main\nfrom bnb_cuda_jetson import backend\n"
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-c", code + "register(backend)\nmain(['doctor', '--json'])"]
    report = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True).stdout)
    # Where the package is installed, that is listed too.
    (row,) = [row for row in report["backends"] if row["name"] == "jetson" and row["state"] != "shadowed"]
    if row["state"] == "ready":
        pytest.skip("this machine has a driver")
    assert row["state"] == "unavailable"
    assert row["notes"].startswith("no NVIDIA driver: libcuda.so.1")
    assert "install the driver, which a Jetson has with JetPack" in row["notes"]


def test_every_embedded_architecture_is_available_and_its_code_is_loaded(run_with_driver):
    for capability in ARCHITECTURES:
        run = run_with_driver("print(backend.available(), backend.description)\n" + dequantize(), str(capability))
        assert f"Support(ok=True, reason='') Fake {capability}" in run.output
        assert run.calls_of("cuModuleLoadData")[-1] == str(capability)


def test_a_driver_that_does_not_start_is_a_reason(run_with_driver):
    run = run_with_driver("print(backend.available().reason)", str(CAPABILITY), failure="cuInit=999")
    assert run.output.strip() == "the NVIDIA driver does not start: CUDA_ERROR_OTHER (999): another failure"


def test_a_driver_without_devices_is_a_reason(run_with_driver):
    assert run_with_driver("print(backend.available().reason)", "").output.strip() == "the NVIDIA driver finds no device"


def test_devices_that_there_is_no_code_for_are_named(run_with_driver):
    run = run_with_driver("print(backend.available().reason)\n" + caught(dequantize()), "61")
    reason, error = run.output.splitlines()
    built = ", ".join(f"{a // 10}.{a % 10}" for a in ARCHITECTURES)
    assert reason == f"no device has a compute capability that this package has code for ({built}): Fake 61 (6.1)"
    assert error.startswith(
        "BackendUnavailableError cuda:0 (Fake 61) has compute capability 6.1; this build of bnb-cuda-jetson has"
    )


@pytest.mark.skipif(80 not in ARCHITECTURES, reason="built without code for sm_80")
def test_code_for_desktop_devices_runs_on_their_successors_but_not_on_a_jetson(run_with_driver):
    assert run_with_driver(dequantize(), "86").calls_of("cuModuleLoadData") == ["80"]
    if 87 not in ARCHITECTURES:
        assert "has compute capability 8.7" in run_with_driver(caught(dequantize()), "87").output


def test_a_launch_has_the_stream_the_grid_and_the_arguments(run_with_driver):
    run = run_with_driver(dequantize(stream=77, out=4352, n=1), str(CAPABILITY))
    assert run.calls_of("cuLaunchKernel") == ["dequantize_4bit_float16 1x1x1 256 stream=77 first=4352"]


def test_blocks_that_make_a_table_are_as_many_as_run_at_once(run_with_driver):
    run = run_with_driver(f"_native.quantize_4bit(0, 0, 256, 512, 1024, 1, {1 << 40}, 2048, 64)\n", str(CAPABILITY))
    assert run.calls_of("cuLaunchKernel")[0].split()[1] == "16x1x1"  # 2 on each of 8 multiprocessors


def test_others_are_as_many_as_the_tensor_has_tiles(run_with_driver):
    run = run_with_driver(dequantize(n=(1 << 40) + 1), str(CAPABILITY))
    assert run.calls_of("cuLaunchKernel")[0].split()[1] == f"{(1 << 27) + 1}x1x1"  # of 8192 elements


def test_code_is_loaded_once_a_device(run_with_driver):
    run = run_with_driver(dequantize() + dequantize() + dequantize(device=1) + dequantize(device=1), f"{CAPABILITY},{CAPABILITY}")
    assert len(run.calls_of("cuModuleLoadData")) == 2
    assert len(run.calls_of("cuModuleGetFunction")) == 2
    assert run.calls_of("cuDevicePrimaryCtxRetain") == ["0", "1"]
    assert len(run.calls_of("cuLaunchKernel")) == 4


def test_a_thread_without_a_context_gets_the_primary_one_for_the_call(run_with_driver):
    run = run_with_driver(dequantize(), str(CAPABILITY))
    assert run.calls_of("cuCtxPushCurrent") == ["0"]
    assert run.calls[-1].startswith("cuCtxPopCurrent")


def test_a_context_that_is_current_already_is_left_alone(run_with_driver):
    run = run_with_driver(dequantize(), str(CAPABILITY), current=0)
    assert not run.calls_of("cuCtxPushCurrent")
    assert not run.calls_of("cuCtxPopCurrent")


def test_another_device_s_context_makes_room(run_with_driver):
    run = run_with_driver(dequantize(device=1), f"{CAPABILITY},{CAPABILITY}", current=0)
    assert run.calls_of("cuCtxPushCurrent") == ["1"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            "cuLaunchKernel",
            "dequantize_4bit failed on cuda:0 (Fake {}): CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access",
        ),
        ("cuModuleLoadData", "loading the device code four_bit for sm_{} failed on cuda:0"),
        ("cuModuleGetFunction", "loading the kernel dequantize_4bit_float16 failed on cuda:0 (Fake {})"),
        ("cuDevicePrimaryCtxRetain", "the primary context of cuda:0 (Fake {}) cannot be had"),
    ],
)
def test_a_failure_is_an_exception_that_names_op_device_and_cause(run_with_driver, failure, message):
    run = run_with_driver(caught(dequantize()), str(CAPABILITY), failure=f"{failure}=700")
    assert run.output.startswith("CudaError " + message.format(CAPABILITY))


def test_cuda_errors_are_caught_as_errors_of_a_backend():
    from bnb_cuda_jetson import CudaError

    from bnb_core.errors import BackendError

    assert issubclass(CudaError, BackendError)


OPTIMIZER = """
count = {count}
addresses = [4096 * (i + 1) for i in range(count)]
numbers = [1.0, 1e-3, 0.9, 0.999, 0.0, 0.0, 0.0, 0.0, 1e-8, 0.0, 0.0, 0.0, 0.0, 1.0, {max_unorm}, 0, 0, 0, 1]
_native.optimizer_step_8bit(0, 0, 0, addresses, addresses, addresses, addresses, [], addresses, addresses, [],
                            [1000] * count, 64, 64, 0, 256, "adam", numbers, {step}, 0, 1 << 20)
"""


def launches(run_with_driver, **settings) -> list:
    values = {"count": 1, "max_unorm": 0.0, "step": 0, **settings}
    return [call.split()[0] for call in run_with_driver(OPTIMIZER.format(**values), str(CAPABILITY)).calls_of("cuLaunchKernel")]


def test_tensors_share_launches(run_with_driver):
    assert launches(run_with_driver, count=42) == ["step_8bit_adam_float32"]
    assert launches(run_with_driver, count=100) == ["step_8bit_adam_float32"] * 3


def test_a_step_on_the_device_is_read_there(run_with_driver):
    assert launches(run_with_driver, step=8192) == ["step_scalars", "step_8bit_adam_float32"]


def test_a_limited_update_is_measured_first(run_with_driver):
    assert launches(run_with_driver, max_unorm=0.1) == ["step_8bit_adam_float32", "step_ratios", "step_8bit_adam_float32"]


def test_scratch_has_room_for_the_sums_of_the_largest_launch():
    few = _native.optimizer_scratch_bytes([256] * 42, 256, True)
    assert _native.optimizer_scratch_bytes([256] * 84, 256, True) == few  # launches take turns
    assert _native.optimizer_scratch_bytes([257] * 42, 256, True) == few + 42 * 16
    assert _native.optimizer_scratch_bytes([256] * 42, 256, False) == few - 42 * 16


EXCHANGE = """
import torch
tensors = [torch.nn.Parameter(torch.zeros(3, 500)), torch.zeros(100, 2)[1:], torch.zeros(())]
addresses, sizes = [tensor.data_ptr() for tensor in tensors], [1500, 198, 1]
def step(lists, sizes):
    _native.optimizer_step_32bit(0, 0, 0, lists, lists, lists, lists, [], sizes, "adam", [0.0] * 19, 0, 0, 0)
step(addresses, sizes)
step(tensors, [])
"""


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="needs torch 2.10, which tells addresses at once"
)
def test_tensors_are_as_good_as_their_addresses_and_sizes(run_with_driver):
    code = EXCHANGE + caught("step([1.5], [1])\n")
    run = run_with_driver(code, str(CAPABILITY), words=30)  # the three tensors' part of the kernel's table
    by_address, by_exchange = run.calls_of("cuLaunchKernel")
    assert by_address == by_exchange
    assert by_address.count(",") == 29
    assert "float" in run.output
