"""Estimates of what each path takes, on made-up devices: they grow with the work, and cross over where that makes sense."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bnb_cuda_jetson import cost
from bnb_cuda_jetson.paths import FEWEST_MANY, FEWEST_PANELS, MANY_TOKENS, PANELS, WMMA


def device(compute_capability, multiprocessors, megahertz, memory_megahertz, bus_bits, integrated):
    """What `_native.device` says of one."""
    return SimpleNamespace(
        compute_capability=compute_capability,
        multiprocessors=multiprocessors,
        clock_kilohertz=megahertz * 1000,
        memory_clock_kilohertz=memory_megahertz * 1000,
        memory_bus_bits=bus_bits,
        integrated=integrated,
    )


#: Integrated ones as drivers of Jetsons describe them: with the clock of the GPU for the memory's.
DEVICES = {
    "AGX Xavier": device(72, 8, 1377, 1377, 256, True),
    "Orin Nano": device(87, 8, 625, 625, 128, True),
    "AGX Orin": device(87, 16, 1300, 1300, 256, True),
    "AGX Thor": device(110, 20, 1575, 1575, 256, True),
    "A100": device(80, 108, 1410, 1215, 5120, False),
    "H200": device(90, 132, 1980, 3201, 6144, False),
}
FIGURES = {name: cost.figures(found) for name, found in DEVICES.items()}
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (896, 896), (128256, 2048))
ROWS = tuple(1 << power for power in range(14))


def paths_for(name: str, M: int, dtype: torch.dtype = torch.bfloat16) -> list:
    """List the paths that are thought of, as `paths.possible` does on a device."""
    if dtype is torch.float32 or FIGURES[name].compute_capability < 80:
        return ["any", "few", *([WMMA] if dtype is torch.float16 else [])]
    found = ["any", *(["one"] if M == 1 else []), "few", *(MANY_TOKENS if M >= FEWEST_MANY else [])]
    return found + ([PANELS] if dtype is torch.bfloat16 and M >= FEWEST_PANELS else [])


def estimate(path: str, name: str, M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16, nested: bool = False) -> float:
    tensor_cores = dtype is not torch.float32 and FIGURES[name].compute_capability >= 80
    return cost.estimate(path, FIGURES[name], tensor_cores, M, N, K, 64, nested)


def fastest(name: str, M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> str:
    return min(paths_for(name, M, dtype), key=lambda path: estimate(path, name, M, N, K, dtype))


def test_bandwidth_of_a_device_with_memory_of_its_own_is_what_its_driver_says():
    assert FIGURES["H200"].bandwidth == pytest.approx(4.23e6, rel=0.02)  # of a copy, as measured


@pytest.mark.parametrize(("name", "gigabytes"), [("AGX Xavier", 136.5), ("Orin Nano", 68), ("AGX Orin", 204.8), ("AGX Thor", 273)])
def test_bandwidth_of_a_jetson_is_that_of_its_module(name, gigabytes):
    """Its driver would have an AGX Orin move 83 GB/s."""
    assert FIGURES[name].bandwidth == pytest.approx(gigabytes * 1e3 * 0.85)


@pytest.mark.parametrize("changes", [{"multiprocessors": 12}, {"integrated": False, "memory_clock_kilohertz": 0}])
def test_bandwidth_of_an_unknown_device_goes_by_its_multiprocessors(changes):
    found = cost.figures(SimpleNamespace(**{**vars(DEVICES["AGX Orin"]), "compute_capability": 88, **changes}))
    assert found.bandwidth == pytest.approx(found.multiprocessors * 12.8e3 * 0.85)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_more_rows_of_x_do_not_take_less(name, N, K):
    for fewer, more in zip(ROWS, ROWS[1:]):
        for path in set(paths_for(name, fewer)) & set(paths_for(name, more)):
            assert estimate(path, name, more, N, K) >= 0.97 * estimate(path, name, fewer, N, K), (path, more)


@pytest.mark.parametrize("name", DEVICES)
def test_a_larger_weight_does_not_take_less(name):
    for M in ROWS:
        for path in paths_for(name, M):
            times = [estimate(path, name, M, size, size) for size in (512, 1024, 2048, 4096, 8192, 16384)]
            assert times == sorted(times), (path, M)
            assert times[-1] > 16 * times[2] / 2  # 64 times the weight: what a launch costs counts less


@pytest.mark.parametrize("change", [{"multiprocessors": 264}, {"clock_kilohertz": 2_500_000}, {"memory_bus_bits": 12288}])
def test_a_faster_device_does_not_take_longer(change):
    faster = cost.figures(SimpleNamespace(**{**vars(DEVICES["H200"]), **change}))
    for M, (N, K) in itertools.product(ROWS, SHAPES):
        for path in paths_for("H200", M):
            assert cost.estimate(path, faster, True, M, N, K, 64, False) <= 1.25 * estimate(path, "H200", M, N, K), (path, M, N, K)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_time_is_at_least_that_of_reading_the_codes(name, N, K, dtype):
    for M in ROWS:
        for path in paths_for(name, M, dtype):
            assert estimate(path, name, M, N, K, dtype) > N * K / 2 / FIGURES[name].bandwidth


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_is_no_way_back(name, N, K, dtype):
    """From some number of rows on, a path for more rows takes over, and keeps what it has."""
    order = (
        ("one", "few", *MANY_TOKENS, PANELS)
        if FIGURES[name].compute_capability >= 80 and dtype is not torch.float32
        else ("few", "any")
        if dtype is not torch.float16
        else ("few", WMMA, "any")
    )
    ranks = [order.index(fastest(name, M, N, K, dtype)) for M in ROWS]
    # Tiles of 32 and 64 rows may take turns with each other where the number of blocks does not divide the multiprocessors.
    stages = [min(rank, order.index("many32")) if "many32" in order and rank < order.index(PANELS) else rank for rank in ranks]
    assert stages == sorted(stages), [order[rank] for rank in ranks]


@pytest.mark.parametrize("name", ["AGX Orin", "Orin Nano", "AGX Thor", "A100", "H200"])
def test_what_is_chosen_for_a_large_weight(name):
    """One row is a matter of memory; hundreds of rows are one of arithmetic, and torch's product is good at that."""
    assert fastest(name, 1, 14336, 4096) in ("one", "few")
    assert fastest(name, 8, 14336, 4096) == "few"
    assert fastest(name, 4096, 14336, 4096) == PANELS
    assert fastest(name, 4096, 14336, 4096, torch.float16) == "many128"


def test_without_tensor_cores_few_rows_have_a_kernel_and_many_have_another():
    for N, K in SHAPES:
        assert [fastest("AGX Xavier", M, N, K) for M in (1, 2, 64, 512)] == ["few", "few", "any", "any"]
        assert {fastest("AGX Xavier", M, N, K, torch.float16) for M in (8, 64, 512)} == {WMMA}


RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.mark.skipif(not RESULTS.exists(), reason="the measurements are not here")
@pytest.mark.parametrize("run", ["gpu_paths_h200.json", "gpu_paths_bfloat16_h200.json"])
def test_choices_are_near_the_fastest_path_that_was_measured(run):
    products = json.loads((RESULTS / run).read_text())["products"]
    assert len(products) >= 90
    for row in products:
        times, dtype = row["microseconds"], getattr(torch, row["dtype"].replace("torch.", ""))
        shape, nested = (row["M"], row["N"], row["K"]), row["nested"]
        estimates = {path: estimate(path, "H200", *shape, dtype, nested) for path in times}
        chosen = min(estimates, key=lambda path: estimates[path])
        assert times[chosen] <= 1.1 * min(times.values()), (row["dtype"], shape, nested, chosen, times)
