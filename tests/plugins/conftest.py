"""Tiny fake packages to discover, and tiny backends whose output says which of them ran."""

import functools
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from bnb_core import backends, ops
from bnb_core.backends import YES, Backend, discovery

PLUGIN = """
import torch
from bnb_core.backends import YES, Backend, Support, hookimpl

backend = Backend(
    {name!r}, api_version={api_version}, priority={priority}, available=lambda: {available}, description=lambda: {description}
)

@backend.kernel("quantize_4bit", devices={{"cpu"}}, dtypes={{torch.float32}})
def quantize_4bit(x, codebook, blocksize, *, out):
    out[1].fill_({mark})

{body}

@hookimpl
def bnb_backends():
    return [backend]
"""


def plugin_source(name, *, api_version=(1, 0), priority=20, available="YES", description="''", mark=1, body=""):
    """Write the module of a plugin whose one kernel sets absmax to `mark`."""
    return PLUGIN.format(
        name=name,
        api_version=api_version,
        priority=priority,
        available=available,
        description=description,
        mark=mark,
        body=textwrap.dedent(body),
    )


class Site:
    """A folder that packages are installed into."""

    def __init__(self, path):
        self.path = path

    def package(self, distribution, version="1.0", entry_points=(), **modules):
        """Install a package: `entry_points` as lines of its group, and the source of each module."""
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[bnb_core.backends]\n" + "\n".join(entry_points) + "\n")
        for module, source in modules.items():
            (self.path / f"{module}.py").write_text(textwrap.dedent(source))
        return info

    def plugin(self, name, distribution=None, version="1.0", source=None, **options):
        """Install a package with one backend."""
        distribution = distribution or f"{name}-bnb"
        module = f"fake_{distribution}".replace("-", "_")  # the real one may be imported already
        source = plugin_source(name, **options) if source is None else source
        return self.package(distribution, version, [f"{name} = {module}"], **{module: source})

    def environment(self, **variables):
        """Return the environment of a process that sees this folder too."""
        path = os.pathsep.join(filter(None, [str(self.path), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": path, **variables}

    def run(self, *command, **variables):
        """Run Python with this folder on its path."""
        return subprocess.run(
            [sys.executable, *command], env=self.environment(**variables), capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Make an empty folder the only one where packages are installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    distributions = functools.partial(discovery.metadata.distributions, path=[str(folder)])
    monkeypatch.setattr(discovery, "metadata", types.SimpleNamespace(distributions=distributions))
    monkeypatch.syspath_prepend(str(folder))
    backends.refresh()
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def elsewhere(tmp_path):
    """An empty folder for subprocesses; they see what is really installed too."""
    (tmp_path / "elsewhere").mkdir()
    return Site(tmp_path / "elsewhere")


@pytest.fixture
def add():
    """Register a backend whose one kernel sets absmax to `mark`."""

    def add(name, mark=1, *, priority=0, devices=("cpu",), dtypes=(torch.float32,), available=YES, when=None):
        backend = Backend(name, api_version=(1, 0), priority=priority, available=lambda: available)

        @backend.kernel("quantize_4bit", devices=set(devices), dtypes=set(dtypes), when=when)
        def quantize_4bit(x, codebook, blocksize, *, out):
            out[1].fill_(mark)

        backends.register(backend)
        return backend

    return add


@pytest.fixture
def ran():
    """Quantize something, and return the mark of the backend that ran."""

    def ran(dtype=torch.float32, blocksize=64):
        return int(ops.quantize_4bit(torch.zeros(4, dtype=dtype), torch.zeros(16), blocksize)[1][0])

    return ran
