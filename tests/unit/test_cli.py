"""The command `bnb`: its help needs none of its subcommands."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

import bnb_core
from bnb_core.cli import COMMANDS, main


def test_help_lists_every_subcommand_and_imports_none():
    script = (
        "import sys\n"
        "from bnb_core.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "assert not [name for name in sys.modules if name.startswith(('torch', 'rich', 'bnb_core.cli.', 'bnb_core.backends'))]\n"
    )
    result = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 0
    for name, (_, line) in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert line.split()[0] in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_has_help_of_its_own(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert f"Usage: main {name}" in result.output


def test_an_unknown_subcommand_is_a_usage_error():
    result = CliRunner().invoke(main, ["docter"])
    assert result.exit_code == 2
    assert "docter" in result.output


def test_version():
    assert CliRunner().invoke(main, ["--version"]).output == f"bnb-core, version {bnb_core.__version__}\n"
