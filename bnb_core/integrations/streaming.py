"""Quantize a checkpoint on disk into another, in memory for a few pieces of one tensor: `quantize_checkpoint`.

The new checkpoint grows in a folder beside its place, with a list of the files that are finished. Each file of the source becomes
one file. A second run after the first was killed keeps what is finished. At the end the folder takes its name.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch

from bnb_core import __version__
from bnb_core.errors import CheckpointError, InvalidArgumentError, StorageError
from bnb_core.integrations.checkpoint_folder import CONFIG_FILE, INDEX_FILE, CheckpointFolder
from bnb_core.integrations.layer_names import LayerNames, find_layers
from bnb_core.integrations.new_folder import NewFolder
from bnb_core.integrations.report import QuantizationReport, QuantizedLayer
from bnb_core.integrations.safetensors_file import (
    ALIGNMENT,
    DTYPES,
    Entry,
    SafetensorsReader,
    SafetensorsWriter,
    as_pieces,
    content_digest,
    header_bytes,
)
from bnb_core.integrations.weight_format import WeightFormat
from bnb_core.ops import int8_quantize_rows
from bnb_core.quantization.blockwise import compress_scales
from bnb_core.quantization.four_bit import DEFAULT_BLOCKSIZE, NESTED_BLOCKSIZE, quantize_4bit
from bnb_core.quantization.state import QuantState

MANIFEST = "bnb-quantize.json"
#: Elements that are quantized at a time. What quantizing them takes is a small multiple of their bytes.
PANEL = 1 << 21
#: What the longest name of a quantized weight's entries adds to its own.
_LONGEST_SUFFIX = ".quant_state.bitsandbytes__nf4"
_ENTRIES_PER_WEIGHT = 6
#: Files of a source that have weights, or say where they are.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")

Progress = Callable[[int, str], None]


def quantize_checkpoint(
    source: Union[str, Path],
    destination: Union[str, Path],
    to: str = "nf4",
    *,
    skip: Sequence[str] = (),
    double_quant: Optional[bool] = None,
    compute_dtype: Optional[torch.dtype] = None,
    threshold: Optional[float] = None,
    device: Union[torch.device, str] = "cpu",
    progress: Progress = lambda count, what: None,
) -> QuantizationReport:
    """Quantize a checkpoint on disk, a few megabytes at a time, into one that transformers and `load_quantized` load.

    Weights of linear layers are found by their names. Embeddings and output layers are left alone, and `skip` adds to that. A
    second call with the same arguments goes on where the first was killed.

    Args:
        source: a folder as transformers saves it: config.json and safetensors files, of any size.
        destination: the folder to make; it may be there if it is empty.
        to: "nf4", "fp4" or "int8".
        skip: names of layers to leave alone, as in `quantize_model`.
        double_quant: as in `quantize_model`.
        compute_dtype: as in `quantize_model`, but by default the source's.
        threshold: as in `quantize_model`.
        device: where to quantize.
        progress: called with the bytes of the source that have just been dealt with, and what they were.

    Returns:
        What was done.

    Raises:
        CheckpointError: the source lacks something, is damaged, or is quantized already.
        InvalidArgumentError: an argument that is not accepted, a destination that is in use, or nothing to quantize.
        StorageError: a file cannot be read or written, for lack of space for example.
    """
    form = WeightFormat.parse(to, double_quant, compute_dtype, threshold)
    if to not in ("int8", *QuantState.valid_quant_types):
        raise InvalidArgumentError(f"the format is {to!r}; transformers loads only 'int8', 'fp4' and 'nf4'")
    final = Path(destination)
    try:
        checkpoint = CheckpointFolder(source)
        with NewFolder(final) as folder:
            return _Conversion(checkpoint, folder, form, skip, torch.device(device), progress).run()
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{error.filename or final}: {error.strerror or error}. Files that are finished are kept: run it again to go on"
        ) from error


class _Conversion:
    """One run from a checkpoint to another."""

    def __init__(
        self,
        source: CheckpointFolder,
        folder: NewFolder,
        form: WeightFormat,
        skip: Sequence[str],
        device: torch.device,
        progress: Progress,
    ) -> None:
        if "quantization_config" in source.config:
            raise CheckpointError(f"{source.folder} is quantized already, as its {CONFIG_FILE} says; start from the original")
        self.source, self.folder, self.form, self.device, self.progress = source, folder, form, device, progress
        entries = source.entries
        self.layers: LayerNames = find_layers(entries, source.config, skip)
        if not self.layers.quantized:
            raise InvalidArgumentError(f"{source.folder} has no weights of linear layers to quantize, by their names")
        self.work = folder.work
        dtypes = {entries[f"{name}.weight"].dtype for name in self.layers.quantized}
        common = DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32
        self.quantization_config = form.to_config(self.layers.told, common)
        self.finished: Dict[str, Dict[str, Any]] = {}

    def run(self) -> QuantizationReport:
        """Convert what is not finished yet, and put everything in its place."""
        self._resume()
        for file in self.source.files:
            if file in self.finished:
                self.progress(sum(entry.nbytes for entry in self.source.files[file].values()), f"{file} was finished before")
                continue
            digest = self._convert(file)
            self.finished[file] = {"bytes": (self.work / file).stat().st_size, "sha256": digest}
            self.folder.write_json(MANIFEST, {"task": self._task(), "finished": self.finished})
        report = self._report()
        self._write_companions()
        (self.work / MANIFEST).unlink()
        self.folder.publish()
        return report

    # -------------------------------------------------------------------------------------------------------------------- resume

    def _task(self) -> Dict[str, Any]:
        """Return what the result depends on."""
        stats = {file: (self.source.folder / file).stat() for file in self.source.files}
        return {
            "version": __version__,
            "quantization_config": self.quantization_config,
            "source": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        }

    def _resume(self) -> None:
        """Keep the files of an earlier run for the same task that are whole; make room otherwise."""
        try:
            manifest = json.loads((self.work / MANIFEST).read_text(encoding="utf-8"))
            same = manifest["task"] == self._task()
            recorded = dict(manifest["finished"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            same, recorded = False, {}
        if not same:
            self.folder.clear()
        for file, record in recorded.items():
            path = self.work / file
            if path.is_file() and path.stat().st_size == record["bytes"] and content_digest(path) == record["sha256"]:
                self.finished[file] = record

    # ------------------------------------------------------------------------------------------------------------------- convert

    def _convert(self, file: str) -> str:
        """Write one file, and return its digest."""
        with SafetensorsReader(self.source.folder / file) as reader:
            room = sum(self._header_bytes(name, entry) for name, entry in reader.entries.items())
            metadata = {"format": "pt", **reader.metadata}
            with SafetensorsWriter(self.work / file, room, metadata) as writer:
                for name, entry in reader.entries.items():
                    layer, _, parameter = name.rpartition(".")
                    if parameter == "weight" and layer in self.layers.quantized:
                        quantize = self._quantize_int8 if self.form.is_int8 else self._quantize_4bit
                        quantize(reader, writer, layer, self._panels(reader, layer, entry))
                    else:
                        pieces = self._counted(reader.pieces(name), name)
                        writer.add_pieces(name, entry.dtype, entry.shape, entry.nbytes, pieces)
                return writer.finish()

    def _header_bytes(self, name: str, entry: Entry) -> int:
        if name.rpartition(".")[0] in self.layers.quantized:
            return _ENTRIES_PER_WEIGHT * header_bytes(name + _LONGEST_SUFFIX, 2)
        return header_bytes(name, len(entry.shape))

    def _shape(self, layer: str, entry: Entry) -> Tuple[int, int]:
        """Return the shape [N, K] of a layer's weight."""
        first, second = entry.shape
        return (second, first) if layer in self.layers.transposed else (first, second)

    def _panels(self, reader: SafetensorsReader, layer: str, entry: Entry) -> Iterator[torch.Tensor]:
        """Yield some rows at a time of a weight [N, K], whole blocks of its elements."""
        N, K = self._shape(layer, entry)
        name = f"{layer}.weight"
        step = DEFAULT_BLOCKSIZE // math.gcd(DEFAULT_BLOCKSIZE, K)
        rows = max(step, PANEL // max(K, 1) // step * step)
        whole = reader.load(name).T if layer in self.layers.transposed else None
        for first in range(0, N, rows):
            last = min(first + rows, N)
            panel = reader.load_rows(name, first, last) if whole is None else whole[first:last].contiguous()
            yield panel.to(self.device)
            self.progress(panel.numel() * panel.element_size(), name)

    def _counted(self, pieces: Iterator[torch.Tensor], name: str) -> Iterator[torch.Tensor]:
        for piece in pieces:
            yield piece
            self.progress(piece.numel(), name)

    def _quantize_4bit(
        self, reader: SafetensorsReader, writer: SafetensorsWriter, layer: str, panels: Iterator[torch.Tensor]
    ) -> None:
        name = f"{layer}.weight"
        entry = reader.entries[name]
        states: List[QuantState] = []

        def quantized() -> Iterator[torch.Tensor]:
            for panel in panels:
                packed, state = quantize_4bit(panel, blocksize=DEFAULT_BLOCKSIZE, quant_type=self.form.quant_type)
                states.append(state)
                yield as_pieces(packed)

        nbytes = (math.prod(entry.shape) + 1) // 2
        writer.add_pieces(name, "U8", (nbytes, 1), nbytes, _now_if_waiting(quantized(), nbytes))
        state = QuantState(
            torch.cat([part.absmax for part in states]) if states else torch.empty(0),
            torch.Size(self._shape(layer, entry)),
            states[0].code,
            DEFAULT_BLOCKSIZE,
            self.form.quant_type,
            DTYPES[entry.dtype],
        )
        if self.form.double_quant:
            compress_scales(state, NESTED_BLOCKSIZE)
        for key, value in state.as_dict(packed=True).items():
            writer.add(f"{name}.{key}", value)

    def _quantize_int8(
        self, reader: SafetensorsReader, writer: SafetensorsWriter, layer: str, panels: Iterator[torch.Tensor]
    ) -> None:
        name = f"{layer}.weight"
        shape = self._shape(layer, reader.entries[name])
        scales: List[torch.Tensor] = []

        def quantized() -> Iterator[torch.Tensor]:
            for panel in panels:
                codes, absmax, _ = int8_quantize_rows(panel)
                scales.append(absmax)
                yield as_pieces(codes)

        nbytes = math.prod(shape)
        writer.add_pieces(name, "I8", shape, nbytes, _now_if_waiting(quantized(), nbytes))
        writer.add(f"{layer}.SCB", torch.cat(scales))
        writer.add(f"{layer}.weight_format", torch.tensor(0, dtype=torch.uint8))

    # --------------------------------------------------------------------------------------------------------------------- finish

    def _report(self) -> QuantizationReport:
        before = self.source.entries
        after: Dict[str, Entry] = {}
        for file in self.source.files:
            with SafetensorsReader(self.work / file) as reader:
                after.update(reader.entries)
        report = QuantizationReport(self.form.quant_type, skipped=self.layers.skipped)
        report.bytes_before, report.bytes_after = _total(before), _total(after)
        own: Dict[str, int] = {}
        for name, entry in after.items():
            layer = name.split(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
            if not name.endswith(".bias"):
                own[layer] = own.get(layer, 0) + entry.nbytes
        for layer in sorted(self.layers.quantized):
            report.layers.append(QuantizedLayer(layer, before[f"{layer}.weight"].nbytes, own[layer]))
        return report

    def _write_companions(self) -> None:
        """Write the configuration and the index, and copy the tokenizer and whatever else belongs to the model."""
        for path in sorted(self.source.folder.iterdir()):
            if path.is_file() and path.name != CONFIG_FILE and not path.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(path, self.work / path.name)
        self.folder.write_json(CONFIG_FILE, {**self.source.config, "quantization_config": self.quantization_config})
        if self.source.sharded:
            places, total = {}, 0
            for file in self.source.files:
                with SafetensorsReader(self.work / file) as reader:
                    places.update(dict.fromkeys(reader.entries, file))
                    total += _total(reader.entries)
            self.folder.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _now_if_waiting(pieces: Iterator[torch.Tensor], nbytes: int) -> Any:
    """Return the pieces, all computed if the writer will ask for them too late for what is computed along with them."""
    return list(pieces) if nbytes % ALIGNMENT else pieces


def _total(entries: Mapping[str, Entry]) -> int:
    return sum(entry.nbytes for entry in entries.values())
