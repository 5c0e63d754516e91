"""Use transformers, peft and accelerate with whatever `bitsandbytes` is: the program of `test_clients.py`.

Run as `client.py CHECKPOINTS TASK...`; it prints the figures of each task as JSON.
"""

import copy
import json
import sys
import tempfile
import warnings

import bitsandbytes
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

IDS = torch.tensor([[1, 17, 5, 40, 9, 33, 2, 61], [3, 8, 50, 21, 7, 12, 44, 30]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
CONFIGS = {"nf4": NF4, "nested": {**NF4, "bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}


def load(checkpoints, shape, quantization=None, **keywords):
    model_class = AutoModel if shape == "bert" else AutoModelForCausalLM
    if quantization is not None:
        keywords["quantization_config"] = BitsAndBytesConfig(**CONFIGS[quantization])
        keywords.setdefault("device_map", "cpu")
    return model_class.from_pretrained(f"{checkpoints}/{shape}", dtype=torch.float32, **keywords)


def outputs(model):
    """Return logits, or hidden states, of the fixed input."""
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def inference(checkpoints, shape, quantization):
    model = load(checkpoints, shape, quantization).eval()
    layers = {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    reloaded = again.state_dict()
    result = {
        "layers": sorted(layers),
        # Without texts, in which bitsandbytes' nested offset may have a digit more or less.
        "saved": sum(v.numel() * v.element_size() for name, v in state.items() if "bitsandbytes__" not in name),
        "unquantized": outputs(load(checkpoints, shape).eval()).double().flatten().tolist(),
        "reloads": state.keys() == reloaded.keys() and all(torch.equal(reloaded[name], value) for name, value in state.items()),
        "outputs": outputs(model).double().flatten().tolist(),
    }
    result["same"] = torch.equal(outputs(model), outputs(again))
    if shape != "bert":
        result["tokens"] = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
    return result


def trainer(checkpoints, shape, optimizer):
    torch.manual_seed(0)
    model = load(checkpoints, shape)
    data = [{"input_ids": row, "labels": row} for row in IDS] * 8
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, optim=optimizer, learning_rate=3e-3, per_device_train_batch_size=2, num_train_epochs=1, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        run = transformers.Trainer(model, args, train_dataset=data)
        run.train()
    return {
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "optimizer": str(type(run.optimizer.optimizer)),
        "quantized": any(
            v.dtype == torch.uint8 for state in run.optimizer.optimizer.state.values() for v in state.values() if torch.is_tensor(v)
        ),
    }


def qlora(checkpoints, shape, quantization):
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(load(checkpoints, shape, quantization), use_gradient_checkpointing=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    model = get_peft_model(base, config).train()
    optimizer = bitsandbytes.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    tuned = outputs(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(load(checkpoints, shape, quantization), folder).eval()
        restored = outputs(again)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # merging into a quantized weight rounds, and says so
        merged = model.merge_and_unload()
    linear = [type(module) for module in merged.modules() if "Linear" in type(module).__name__]
    result = {
        "losses": losses,
        "restored": (restored - tuned).abs().max().item() / tuned.abs().max().item(),
        "merged": (outputs(merged) - tuned).norm().item() / tuned.norm().item(),
        "layers": sorted({layer.__name__ for layer in linear}),
    }
    again.unload()
    return result


def offload(checkpoints, shape, quantization):
    """Let accelerate place the layers, and bring each weight by a hook before its layer runs."""
    from accelerate import cpu_offload
    from accelerate.utils import infer_auto_device_map

    model = load(checkpoints, shape, quantization).eval()
    expected = outputs(model)
    places = infer_auto_device_map(model, max_memory={"cpu": 10**9})
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    return {"same": torch.equal(outputs(offloaded), expected), "places": sorted(set(map(str, places.values())))}


TASKS = {"inference": inference, "trainer": trainer, "qlora": qlora, "offload": offload}

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    # On CPUs with AVX512-BF16, bitsandbytes computes in bfloat16 whatever the compute dtype is, and damages what is saved after it.
    if hasattr(bitsandbytes.nn.modules, "has_avx512bf16"):
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    torch.set_num_threads(1)
    figures = {}
    for task in sys.argv[2:]:
        name, *arguments = task.split(":")
        figures[task] = TASKS[name](sys.argv[1], *arguments)
    print(json.dumps(figures))
