"""Measure the memory that `quantize_checkpoint` takes: `python quantize_memory.py FOLDER [GIGABYTES]`.

Makes a checkpoint in FOLDER with an embedding of a quarter of its size, quantizes it in a process of its own, and fails where the
peak, above what that process had after `import torch`, is not under twice the largest tensor plus 150 MB.
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
before = resident("VmRSS")
import bnb_core
bnb_core.quantize_checkpoint(sys.argv[1], sys.argv[2], "nf4")
print(resident("VmHWM") - before)
"""


def make(folder, total):
    """Write the checkpoint, and return the size of its largest tensor."""
    embedding_bytes = total // 4
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
    return max(embedding_bytes, LAYER_BYTES)


def main(folder, gigabytes="4"):
    """Make, quantize, compare."""
    source, destination = Path(folder) / "source", Path(folder) / "quantized"
    for old in (source, destination):
        shutil.rmtree(old, ignore_errors=True)
    try:
        largest = make(source, int(float(gigabytes) * 1e9))
        output = subprocess.run(
            [sys.executable, "-c", MEASURE, str(source), str(destination)], stdout=subprocess.PIPE, check=True
        ).stdout
    finally:
        for made in (source, destination):
            shutil.rmtree(made, ignore_errors=True)
    peak, bound = int(output), 2 * largest + 150e6
    print(f"peak {peak / 1e6:.0f} MB above `import torch`; largest tensor {largest / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
    sys.exit(peak >= bound)


if __name__ == "__main__":
    main(*sys.argv[1:])
