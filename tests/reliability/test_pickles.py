"""Checkpoints that are pickles run code when they are loaded: nothing here loads any."""

import ast
from pathlib import Path

import pytest
import torch

import bnb_core
from bnb_core.errors import CheckpointError

ROOT = Path(bnb_core.__file__).parent
UNPICKLES = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "numpy.load", "np.load"}


class _Bomb:
    """What happens when it is unpickled is seen by a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_folder_of_pickles_is_refused(name, tmp_path):
    folder, exploded = tmp_path / "model", tmp_path / "exploded"
    folder.mkdir()
    torch.save({"weight": _Bomb(exploded)}, folder / name)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for call in (
        lambda: bnb_core.quantize_checkpoint(folder, tmp_path / "quantized", "nf4"),
        lambda: bnb_core.load_quantized(folder, model=torch.nn.Linear(2, 2)),
    ):
        with pytest.raises(CheckpointError, match=f"but only {name}; save the model as safetensors"):
            call()
    assert not exploded.exists()


def test_nothing_unpickles():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and f"{node.value.id}.{node.attr}" in UNPICKLES:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
