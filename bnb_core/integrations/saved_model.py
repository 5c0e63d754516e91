"""Save a quantized model to a folder, and load one tensor by tensor: `save_quantized`, `load_quantized`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple, Union

import torch
from torch import nn

from bnb_core.errors import CheckpointError, InvalidArgumentError, StorageError
from bnb_core.integrations.checkpoint_folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, CheckpointFolder
from bnb_core.integrations.model import is_transposed_linear, names_of, replace_module
from bnb_core.integrations.new_folder import NewFolder
from bnb_core.integrations.safetensors_file import SafetensorsReader, SafetensorsWriter, header_bytes
from bnb_core.integrations.weight_format import WeightFormat
from bnb_core.nn import Linear4bit, Linear8bitLt
from bnb_core.quantization.checkpoint import PACKED_PREFIX

#: Where a file ends and the next begins by default: transformers' own choice.
SHARD_BYTES = 5_000_000_000


def save_quantized(model: nn.Module, folder: Union[str, Path], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Save a model with quantized layers as transformers and bitsandbytes save it; a tied weight is saved once.

    The folder appears when all of it is on disk; until then, its name has ".partial" appended.

    Args:
        model: any module; if it has a `config` with `to_dict`, as those of transformers do, that is saved too.
        folder: is made; it may be there if it is empty.
        shard_bytes: begin another file where one would have more bytes of tensors than this. What belongs to one layer stays
            together.

    Raises:
        InvalidArgumentError: no layer is quantized, they have different formats, or the folder is in use.
        StorageError: the files cannot be written, or another process is writing them.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, (Linear4bit, Linear8bitLt))]
    formats = {WeightFormat.of(layer) for layer in layers}
    if len(formats) != 1:
        found = ", ".join(sorted(form.quant_type for form in formats)) or "nothing"
        raise InvalidArgumentError(f"save_quantized: {found} is quantized in {type(model).__name__}; layers must have one format")
    if shard_bytes < 1:
        raise InvalidArgumentError(f"save_quantized: shard_bytes is {shard_bytes}; it must be at least 1")
    skipped = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    own: Any = getattr(model, "config", None)
    config = own.to_dict() if hasattr(own, "to_dict") else {}
    config.pop("quantization_config", None)
    config = {**config, "architectures": [type(model).__name__]}
    config["quantization_config"] = formats.pop().to_config(skipped, torch.float32)
    shards = _shards(_tensors_to_save(model), shard_bytes)
    try:
        with NewFolder(Path(folder)) as new:
            new.clear()
            try:
                _write_shards(new, shards)
                new.write_json(CONFIG_FILE, config)
                new.publish()
            except BaseException:
                new.clear()
                raise
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"save_quantized: {folder}: {error.strerror or error}") from error


def _write_shards(new: NewFolder, shards: List[Dict[str, torch.Tensor]]) -> None:
    places: Dict[str, str] = {}
    for index, tensors in enumerate(shards):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        room = sum(header_bytes(name, tensor.dim()) for name, tensor in tensors.items())
        with SafetensorsWriter(new.work / file, room, {"format": "pt"}) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            writer.finish()
        places.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = sum(_size(tensor) for tensors in shards for tensor in tensors.values())
        new.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _tensors_to_save(model: nn.Module) -> Dict[str, torch.Tensor]:
    # One module may be in several places; it is saved in the first.
    others = tuple(f"{name}." for names in names_of(model, lambda module: True) for name in names[1:])
    tensors: Dict[Tuple[int, Tuple[int, ...]], Tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(others):
            continue
        # Empty tensors share the null address.
        tensors.setdefault((tensor.data_ptr() or -len(tensors), tuple(tensor.shape)), (name, tensor))
    return dict(tensors.values())


def _shards(tensors: Dict[str, torch.Tensor], shard_bytes: int) -> List[Dict[str, torch.Tensor]]:
    """Distribute tensors in their order; those of one module stay together."""
    modules: Dict[str, Dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        modules.setdefault(name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0], {})[name] = tensor
    shards: List[Dict[str, torch.Tensor]] = [{}]
    used = 0
    for members in modules.values():
        size = sum(map(_size, members.values()))
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1].update(members)
        used += size
    return shards


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def load_quantized(
    folder: Union[str, Path], device: Union[torch.device, str] = "cpu", model: Optional[nn.Module] = None
) -> nn.Module:
    """Load a quantized checkpoint tensor by tensor, straight to a device.

    Args:
        folder: what `save_quantized`, `bnb quantize` or transformers wrote.
        device: where the model is to be.
        model: one of the same architecture, not quantized, which is filled in place; its own weights are not needed, so that it
            may be on the meta device. By default it is made by transformers from config.json.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: the checkpoint is damaged, not quantized, or lacks tensors that the model has or the other way round.
        InvalidArgumentError: there is no model, and config.json names none that transformers knows.
        StorageError: a file cannot be read.
    """
    try:
        source = CheckpointFolder(folder)
        if "quantization_config" not in source.config:
            raise CheckpointError(
                f"{source.folder / CONFIG_FILE} has no quantization_config; quantize it with `bnb quantize` first"
            )
        form = WeightFormat.from_config(source.config["quantization_config"])
        model = _model_from_config(source) if model is None else model
        return _load(source, form, model, torch.device(device)).eval()
    except OSError as error:
        raise StorageError(f"load_quantized: {folder}: {error.strerror or error}") from error


def _load(source: CheckpointFolder, form: WeightFormat, model: nn.Module, device: torch.device) -> nn.Module:
    groups = _quantized_groups(source)
    _replace_layers(model, form, list(groups))
    places = _places(model)
    done: Set[str] = set()
    for file, entries in source.files.items():
        with SafetensorsReader(source.folder / file) as reader:
            for name in entries:
                layer = _layer_of(name, groups)
                if layer is None:
                    if name not in places:
                        raise CheckpointError(f"{source.folder}: {name!r} is nothing that {type(model).__name__} has")
                    _put(places[name], reader.load(name, device), name)
                    done.update(other for other in places if places[other] is places[name])
                elif name == f"{layer}.weight":
                    saved = {key: _load_from(source, reader, key, device) for key in groups[layer]}
                    _load_layer(model.get_submodule(layer), layer, saved)
                    done.add(name)
    missing = sorted(set(places) - done)
    if missing:
        raise CheckpointError(f"{source.folder} lacks {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:3])}")
    # Buffers that no checkpoint has.
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[key] = buffer.to(device)
    return model


def _quantized_groups(source: CheckpointFolder) -> Dict[str, List[str]]:
    """Return the entries that belong to each quantized weight, by the name of the layer."""
    entries = source.entries
    groups: Dict[str, List[str]] = {}
    for name in entries:
        layer, found, _ = name.partition(f".weight.quant_state.{PACKED_PREFIX}")
        if found:
            groups[layer] = [f"{layer}.weight"]
        elif name.endswith(".SCB"):
            groups[name[: -len(".SCB")]] = [f"{name[: -len('.SCB')]}.weight"]
    for name in entries:
        head, found, _ = name.partition(".weight.")
        layer = head if found else name.rpartition(".")[0]
        if layer in groups and (found or name.rpartition(".")[2] in ("SCB", "weight_format")):
            groups[layer].append(name)
    absent = [names[0] for names in groups.values() if names[0] not in entries]
    if absent:
        raise CheckpointError(f"{source.folder} has statistics but no codes of {absent[0]}")
    return groups


def _layer_of(name: str, groups: Dict[str, List[str]]) -> Optional[str]:
    for layer in (name.partition(".weight.")[0], name.rpartition(".")[0]):
        if name in groups.get(layer, ()):
            return layer
    return None


def _load_from(source: CheckpointFolder, reader: SafetensorsReader, name: str, device: torch.device) -> torch.Tensor:
    """Load a tensor from whichever file has it; the part that is JSON stays on the CPU."""
    device = torch.device("cpu") if PACKED_PREFIX in name else device
    if name in reader.entries:
        return reader.load(name, device)
    file = next(file for file, entries in source.files.items() if name in entries)
    with SafetensorsReader(source.folder / file) as other:
        return other.load(name, device)


def _replace_layers(model: nn.Module, form: WeightFormat, names: List[str]) -> None:
    modules: Dict[str, Any] = dict(model.named_modules())
    aliases = {group[0]: group for group in names_of(model, lambda module: True)}
    for name in names:
        old = modules.get(name)
        if isinstance(old, (Linear4bit, Linear8bitLt)):
            continue
        if not (isinstance(old, nn.Linear) or (old is not None and is_transposed_linear(old))):
            found = "nothing" if old is None else f"a {type(old).__name__}"
            raise CheckpointError(f"the checkpoint has a quantized weight of {name}, but the model has {found} of that name")
        shape = tuple(old.weight.shape)
        new = form.layer(*(shape if is_transposed_linear(old) else shape[::-1]))
        new.bias = old.bias
        for alias in aliases[name]:
            replace_module(model, alias, new)


def _load_layer(layer: Any, name: str, saved: Dict[str, torch.Tensor]) -> None:
    """Let the layer itself check and take its weight; its bias comes by itself."""
    bias, layer.bias = layer.bias, None
    missing: List[str] = []
    errors: List[str] = []
    layer._load_from_state_dict(saved, f"{name}.", {"assign_to_params_buffers": True}, True, missing, [], errors)
    layer.bias = bias
    if missing or errors:
        raise CheckpointError(f"{name}: {'; '.join(errors) or 'the checkpoint lacks ' + ', '.join(missing)}")


def _places(model: nn.Module) -> Dict[str, List[Tuple[nn.Module, str]]]:
    """Return where each tensor of a checkpoint goes, by name; tied parameters share a list of places."""
    shared: Dict[int, List[Tuple[nn.Module, str]]] = {}
    places: Dict[str, List[Tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None and key not in module._non_persistent_buffers_set:
                name = f"{prefix}.{key}" if prefix else key
                places[name] = shared.setdefault(id(value), [])
                places[name].append((module, key))
    return places


def _put(places: List[Tuple[nn.Module, str]], tensor: torch.Tensor, name: str) -> None:
    module, key = places[0]
    old = module._parameters.get(key)
    holder: Any = module._buffers if old is None else module._parameters
    shape = holder[key].shape
    if shape != tensor.shape:
        raise CheckpointError(f"{name} is {list(tensor.shape)} in the checkpoint and {list(shape)} in the model")
    new = tensor if old is None else nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    for module, key in places:
        holder = module._buffers if old is None else module._parameters
        holder[key] = new


def _model_from_config(source: CheckpointFolder) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InvalidArgumentError(
            "load_quantized: transformers, which makes the model from config.json, is not installed; install it or pass `model`"
        ) from error
    architectures = source.config.get("architectures") or ["none"]
    architecture: Any = getattr(transformers, str(architectures[0]), None)
    if not hasattr(architecture, "config_class"):
        raise InvalidArgumentError(f"load_quantized: transformers has no model {architectures[0]!r}; pass `model`")
    config = architecture.config_class.from_dict(
        {key: value for key, value in source.config.items() if key != "quantization_config"}
    )
    with _parameters_on_meta():
        return architecture(config)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that are made here have parameters without memory; buffers keep theirs, for some are in no checkpoint."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: Optional[nn.Parameter]) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
