"""Measure the memory of `quantize_checkpoint` and `load_quantized`: `python quantize_memory.py FOLDER [GIGABYTES]`.

Makes a checkpoint in FOLDER with an embedding of a quarter of its size, quantizes it in a process of its own, and loads the result
in another. Fails where a peak is not under its bound: for quantizing, above what the process had after `import torch`, twice the
largest tensor plus 150 MB; for loading, above what it had with the empty model (torch loads up to 170 MB of its own for the first
module on the meta device), the quantized checkpoint plus 150 MB.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bnb_core.integrations.safetensors_file import SafetensorsWriter, header_bytes

WIDTH = 4096
#: Matrices of WIDTH by WIDTH in bfloat16.
LAYER_BYTES = WIDTH * WIDTH * 2
LAYERS_PER_FILE = 16

MEASURE = """
import sys, torch
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
{work}
print(resident("VmHWM") - before)
"""
QUANTIZE = """
before = resident("VmRSS")
import bnb_core
bnb_core.quantize_checkpoint(sys.argv[1], sys.argv[2], "nf4")
"""
#: Into a model of the checkpoint's names, on the meta device.
LOAD = """
from torch import nn
class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, width, bias=False, dtype=torch.bfloat16, device="meta")})
class Model(nn.Module):
    def __init__(self, rows, width, layers):
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, width, dtype=torch.bfloat16, device="meta")
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
model = nn.ModuleDict({"model": Model(*map(int, sys.argv[2:]))})
before = resident("VmRSS")
import bnb_core
model = bnb_core.load_quantized(sys.argv[1], "cpu", model)
assert not any(tensor.is_meta for tensor in model.state_dict().values())
"""


def make(folder, total):
    """Write the checkpoint, and return the rows of its embedding and the number of its layers."""
    embedding_bytes = total // 4 // (2 * WIDTH) * (2 * WIDTH)
    layers = (total - embedding_bytes) // LAYER_BYTES
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(layers)]
    parts = [["model.embed_tokens.weight"]] + [
        names[first : first + LAYERS_PER_FILE] for first in range(0, layers, LAYERS_PER_FILE)
    ]
    folder.mkdir(parents=True)
    places = {}
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05}-of-{len(parts):05}.safetensors"
        with SafetensorsWriter(folder / file, sum(header_bytes(name, 2) for name in part), {"format": "pt"}) as writer:
            for name in part:
                rows = embedding_bytes // (2 * WIDTH) if "embed" in name else WIDTH
                writer.add(name, torch.full((rows, WIDTH), 0.01, dtype=torch.bfloat16))
            writer.finish()
        places.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return embedding_bytes // (2 * WIDTH), layers


def peak(work, *arguments):
    """Return the bytes that a process takes at most, above what it had where `work` takes `before`."""
    command = [sys.executable, "-c", MEASURE.format(work=work), *map(str, arguments)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main(folder, gigabytes="4"):
    """Make, quantize, load, compare."""
    source, destination = Path(folder) / "source", Path(folder) / "quantized"
    for old in (source, destination):
        shutil.rmtree(old, ignore_errors=True)
    try:
        rows, layers = make(source, int(float(gigabytes) * 1e9))
        largest = max(rows * WIDTH * 2, LAYER_BYTES)
        results = [("quantizing", peak(QUANTIZE, source, destination), 2 * largest)]
        quantized = sum(path.stat().st_size for path in destination.iterdir())
        results.append(("loading", peak(LOAD, destination, rows, WIDTH, layers), quantized))
    finally:
        for made in (source, destination):
            shutil.rmtree(made, ignore_errors=True)
    print(f"largest tensor {largest / 1e6:.0f} MB, quantized checkpoint {quantized / 1e6:.0f} MB")
    for what, most, bound in results:
        print(f"{what}: peak {most / 1e6:.0f} MB more, bound {bound / 1e6 + 150:.0f} MB")
    sys.exit(any(most >= bound + 150e6 for _, most, bound in results))


if __name__ == "__main__":
    main(*sys.argv[1:])
