"""Fine-tune a language model with QLoRA: its weights in 4 or 8 bits, an adapter beside them, and AdamW with paged 8-bit states.

It is written for bitsandbytes, transformers, peft and accelerate, and knows nothing of bnb_core. Each of these trains the same:

    bnb run finetune_qlora.py MODEL TEXTS ADAPTER
    bnb run accelerate launch finetune_qlora.py MODEL TEXTS ADAPTER
    bnb run -m torch.distributed.run --nproc_per_node 2 finetune_qlora.py MODEL TEXTS ADAPTER --batch-size 2

MODEL is a folder that transformers reads, or the name of a model of its hub; TEXTS a file with a text on each line.
"""

import argparse
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_linear_schedule_with_warmup


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a language model with QLoRA.")
    parser.add_argument("model", help="folder or name of the model")
    parser.add_argument("texts", type=Path, help="file with a text on each line")
    parser.add_argument("adapter", type=Path, help="folder to write the adapter to")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="texts a step and process")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--prompt", help="what to have continued by the model that comes out")
    return parser.parse_args()


def load_model(name, bits, device):
    """Load the model onto the device, its linear layers quantized."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    place = "cpu" if device.type == "cpu" else device.index
    return AutoModelForCausalLM.from_pretrained(name, quantization_config=config, torch_dtype=dtype, device_map={"": place})


def add_adapter(model, rank):
    """Freeze the model and put an adapter on each of its quantized layers."""
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    quantized = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, quantized)}
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=sorted(layers), task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def main():
    """Train and save the adapter, and try it."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def collate(texts):
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    texts = arguments.texts.read_text(encoding="utf-8").splitlines()
    loader = DataLoader(texts, batch_size=arguments.batch_size, collate_fn=collate)
    model = add_adapter(load_model(arguments.model, arguments.bits, accelerator.device), arguments.rank)
    if accelerator.is_main_process:
        model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(trained, lr=arguments.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader) * arguments.epochs)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    model.train()
    for epoch in range(arguments.epochs):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            accelerator.print(f"epoch {epoch} loss {accelerator.gather(loss.detach().reshape(1)).mean().item():.6f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(arguments.adapter)
        if arguments.prompt:
            base = load_model(arguments.model, arguments.bits, accelerator.device)
            tuned = PeftModel.from_pretrained(base, arguments.adapter).eval()
            inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(accelerator.device)
            print(tokenizer.decode(tuned.generate(**inputs, max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    main()
