"""A training script that imports bitsandbytes, transformers, peft and accelerate runs untouched, however it is started."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_qlora.py"
if not SCRIPT.exists():
    pytest.skip("the examples are not beside these tests", allow_module_level=True)

SETTINGS = ("--lr", "1e-2", "--prompt", "w2 w5 w8")
real_is_installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def finetune(tmp_path_factory, word_tokenizer):
    """The script and its arguments, for a small model and texts that are easily learnt."""
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / "model", safe_serialization=True)
    word_tokenizer(96).save_pretrained(folder / "model")
    lines = (" ".join(f"w{2 + (7 * start + 3 * step) % 90}" for step in range(10)) for start in range(4))
    (folder / "texts").write_text("\n".join([*lines] * 6), encoding="utf-8")
    return lambda *more: (SCRIPT, folder / "model", folder / "texts", folder / "adapter", *SETTINGS, *more)


@pytest.fixture(scope="module")
def alone(bnb_run, finetune):
    """The losses of the script in one process, and what it makes of the prompt, by the bits of its weights."""
    return {bits: figures(bnb_run(*finetune("--bits", bits))) for bits in (4, 8)}


def figures(output):
    return [float(loss) for loss in re.findall(r"loss (\S+)", output)], re.findall("^w2 w5 w8.*$", output, re.MULTILINE)


@pytest.mark.parametrize("bits", [4, 8])
def test_script_trains_and_generates(alone, bits):
    losses, texts = alone[bits]
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    assert len(texts) == 1


@real_is_installed
@pytest.mark.parametrize("bits", [4, 8])
def test_script_trains_as_with_bitsandbytes(alone, run_program, finetune, bits):
    losses, _ = figures(run_program(sys.executable, *finetune("--bits", bits)))
    assert alone[bits][0] == pytest.approx(losses, rel=1e-2)


def test_accelerate_launch(bnb_run, finetune, alone):
    launched = bnb_run("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *finetune())
    assert figures(launched) == alone[4]


@pytest.mark.skipif(not hasattr(torch.cpu, "set_device"), reason="accelerate has no several processes on CPUs with this torch")
def test_two_processes_train_as_one(bnb_run, finetune, alone, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # on machines without a GPU, it uses one process unless told
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    losses, texts = figures(bnb_run(*launch, *finetune("--batch-size", "2")))
    assert losses == pytest.approx(alone[4][0], rel=1e-3)
    assert texts == alone[4][1]
