"""A folder with a checkpoint in safetensors files: which file has which tensor, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Union

from bnb_core.errors import CheckpointError
from bnb_core.integrations.safetensors_file import Entry, SafetensorsReader

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


class CheckpointFolder:
    """A checkpoint, of which only the headers are read at first.

    Args:
        folder: holds `model.safetensors`, or several files and `model.safetensors.index.json`; and `config.json`.

    Attributes:
        config: what config.json has.
        files: for each file, its tensors by name.

    Raises:
        CheckpointError: something is missing or damaged.
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is no folder; pass one with a config.json and {SINGLE_FILE}, or several with their index"
            )
        self.config = _read_json(self.folder / CONFIG_FILE)
        self.sharded = not (self.folder / SINGLE_FILE).is_file()
        listed = self._read_index() if self.sharded else {SINGLE_FILE: []}
        self.files: Dict[str, Mapping[str, Entry]] = {}
        places: Dict[str, str] = {}
        for file, names in sorted(listed.items()):
            entries = self._read_entries(file)
            absent = [name for name in names if name not in entries]
            if absent:
                raise CheckpointError(f"{self.folder / INDEX_FILE} says that {file} has {absent[0]!r}, but it does not")
            for name in entries:
                if places.setdefault(name, file) != file:
                    raise CheckpointError(f"{self.folder}: both {places[name]} and {file} have {name!r}")
            self.files[file] = entries

    @property
    def entries(self) -> Dict[str, Entry]:
        """All the tensors by name."""
        return {name: entry for entries in self.files.values() for name, entry in entries.items()}

    def _read_index(self) -> Dict[str, List[str]]:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            others = sorted(file.name for file in self.folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
            found = f"only {', '.join(others[:3])}" if others else "no weights at all"
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, but {found}; save the model as safetensors"
            )
        places = _read_json(path).get("weight_map")
        files: Dict[str, List[str]] = {}
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"{path} has no weight_map that says which file has which tensor; it is damaged")
        for name, file in places.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{path}: the file of {name!r} is {file!r}; it must be the name of a file beside the index")
            files.setdefault(file, []).append(name)
        return files

    def _read_entries(self, file: str) -> Mapping[str, Entry]:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {INDEX_FILE} says that it has part of the weights. Download it again")
        with SafetensorsReader(path) as reader:
            return reader.entries


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; the folder is no checkpoint that transformers could load") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds a JSON {type(value).__name__}, not an object")
    return value
