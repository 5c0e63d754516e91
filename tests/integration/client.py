"""Use transformers, peft, accelerate and trl with whatever `bitsandbytes` is: the program of `test_clients.py`.

Run as `client.py CHECKPOINTS TASK...`; it prints the figures of each task as JSON.
"""

import copy
import inspect
import json
import sys
import tempfile
import warnings

import bitsandbytes
import torch
import transformers
from exact_model import exact_model
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

IDS = torch.tensor([[1, 17, 5, 40, 9, 33, 2, 61], [3, 8, 50, 21, 7, 12, 44, 30]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
CONFIGS = {
    "nf4": NF4,
    "nested": {**NF4, "bnb_4bit_use_double_quant": True},
    "stored": {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.float32},  # as for sharding
    "int8": {"load_in_8bit": True},
}

#: What `from_pretrained` calls the dtype.
FLOAT32 = {"dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype": torch.float32}


def load(checkpoints, shape, quantization=None, **keywords):
    model_class = AutoModel if shape.startswith("bert") else AutoModelForCausalLM
    if quantization is not None:
        keywords["quantization_config"] = BitsAndBytesConfig(**CONFIGS[quantization])
        keywords.setdefault("device_map", "cpu")
    return model_class.from_pretrained(f"{checkpoints}/{shape}", **FLOAT32, **keywords).eval()


def outputs(model):
    """Return logits, or hidden states, of the fixed input."""
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def answers(model):
    """Return the outputs as numbers and, of a model that generates, the most likely tokens."""
    result = {"outputs": outputs(model).double().flatten().tolist()}
    if model.can_generate():
        result["tokens"] = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
    return result


def linear_layers(model):
    return sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__})


def compared(model, checkpoints, shape):
    """Return what a quantized model answers, beside the model without quantization and beside what its codes stand for."""
    return {
        "layers": linear_layers(model),
        "unquantized": answers(load(checkpoints, shape)),
        "exact": answers(exact_model(model, load(checkpoints, shape))),
        **answers(model),
    }


def contents(state):
    """Return a state dict as bytes: codes that are stored as floating-point numbers may be NaN."""
    return {name: (value.dtype, value.shape, value.numpy().tobytes()) for name, value in state.items()}


def inference(checkpoints, shape, quantization):
    model = load(checkpoints, shape, quantization)
    state = model.state_dict()
    before = contents(state)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, device_map="cpu", **FLOAT32).eval()
    return {
        # Without texts, in which bitsandbytes' nested offset may have a digit more or less.
        "saved": sum(v.numel() * v.element_size() for name, v in state.items() if "bitsandbytes__" not in name),
        "reloads": contents(again.state_dict()) == before,
        "same": torch.equal(outputs(model), outputs(again)),
        **compared(model, checkpoints, shape),
    }


def prequantized(checkpoints, shape, quantization):
    """Load what `bnb quantize` has written."""
    return compared(load(checkpoints, f"{shape}-{quantization}", device_map="cpu"), checkpoints, shape)


#: Arguments of a Trainer: eight steps, and a checkpoint in the middle.
TRAINING = {
    "per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1, "report_to": [], "save_steps": 4,
    "use_cpu": True, "disable_tqdm": True, "seed": 0,
}  # fmt: skip


def trained(make_trainer, folder):
    """Train, once from the start and once from the checkpoint in the middle, and return what there is to say of it."""
    trainer = make_trainer()
    trainer.train()
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    optimizer = trainer.optimizer.optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {
        "losses": losses_of(trainer),
        "resumed": losses_of(resumed),
        "optimizer": str(type(optimizer)),
        "quantized": any(value.dtype == torch.uint8 for value in states),
    }


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(checkpoints, shape, optimizer):
    torch.manual_seed(0)
    data = [{"input_ids": row, "labels": row} for row in IDS] * 8
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(folder, optim=optimizer, learning_rate=3e-3, **TRAINING)
        return trained(lambda: transformers.Trainer(load(checkpoints, shape).train(), args, train_dataset=data), folder)


def tune(model, steps):
    """Train what is trainable of a model on the fixed input, and return the losses."""
    model.train()
    optimizer = bitsandbytes.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def dequantizes_on_cpus():
    """Say whether peft does: up to 0.13 it takes the weights to a GPU."""
    from peft.utils.integrations import dequantize_bnb_weight

    return 'torch.device("cuda")' not in inspect.getsource(dequantize_bnb_weight)


def adapters(checkpoints, shape, quantization):
    """Train other adapters than LoRA's."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model, prepare_model_for_kbit_training

    places = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    kinds = {
        "adalora": AdaLoraConfig(total_step=8, **places),
        "ia3": IA3Config(feedforward_modules=[], **places),
    }
    if dequantizes_on_cpus():
        kinds["olora"] = LoraConfig(r=4, init_lora_weights="olora", **places)
        if quantization != "int8":  # where the first forward of bitsandbytes takes the scales from the weight, in which DoRA looks
            kinds["dora"] = LoraConfig(r=4, use_dora=True, **places)
    losses = {}
    for name, config in kinds.items():
        torch.manual_seed(0)
        base = prepare_model_for_kbit_training(load(checkpoints, shape, quantization), use_gradient_checkpointing=False)
        losses[name] = tune(get_peft_model(base, config), 3)
    return losses


def qlora(checkpoints, shape, quantization):
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(load(checkpoints, shape, quantization), use_gradient_checkpointing=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    model = get_peft_model(base, config)
    losses = tune(model, 8)
    tuned = outputs(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(load(checkpoints, shape, quantization), folder).eval()
        restored = outputs(again)
    result = {
        "losses": losses,
        "restored": (restored - tuned).abs().max().item() / tuned.abs().max().item(),
        "unloaded": torch.equal(outputs(again.unload()), outputs(load(checkpoints, shape, quantization))),
    }
    if dequantizes_on_cpus():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # merging into a quantized weight rounds, and says so
            merged = model.merge_and_unload()
        result["merged"] = (outputs(merged) - tuned).norm().item() / tuned.norm().item()
        result["layers"] = linear_layers(merged)
    return result


def sft(checkpoints, shape, quantization):
    """Fine-tune a quantized model by trl, from texts in memory."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{checkpoints}/{shape}")
    texts = [" ".join(f"w{number}" for number in row.tolist()) for row in IDS] * 8
    adapter = LoraConfig(r=64, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, optim="paged_adamw_8bit", learning_rate=1e-2, max_length=16, bf16=False, **TRAINING)
        settings = {"train_dataset": Dataset.from_dict({"text": texts}), "processing_class": tokenizer, "peft_config": adapter}
        return trained(lambda: SFTTrainer(load(checkpoints, shape, quantization), args, **settings), folder)


def offload(checkpoints, shape, quantization):
    """Let accelerate place the layers, and bring each weight from memory or from disk before its layer runs."""
    from accelerate import cpu_offload, disk_offload, dispatch_model
    from accelerate.utils import infer_auto_device_map

    model, cpu = load(checkpoints, shape, quantization), torch.device("cpu")
    places = infer_auto_device_map(model, max_memory={"cpu": 10**9})
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "places": dispatch_model(copy.deepcopy(model), places, main_device="cpu", force_hooks=True),
            "memory": cpu_offload(copy.deepcopy(model), execution_device=cpu),
            "disk": disk_offload(copy.deepcopy(model), f"{folder}/disk", execution_device=cpu),
        }
        if quantization != "int8":  # accelerate takes int8 weights to a GPU first
            parts = {
                "model.embed_tokens": "cpu",
                "model.layers": "disk",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "cpu",
            }
            models["parts"] = dispatch_model(copy.deepcopy(model), parts, main_device="cpu", offload_dir=f"{folder}/parts")
        expected = outputs(model)
        return {name: torch.equal(outputs(placed), expected) for name, placed in models.items()}


TASKS = {task.__name__: task for task in (inference, prequantized, trainer, qlora, adapters, sft, offload)}

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
