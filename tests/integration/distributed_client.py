"""One of several processes that train together: the program of `test_distributed.py`, which starts it once for each rank.

It reads tasks from its input, a line of JSON each, and answers each with a line: the result, or the traceback. What ranks compute
is the same in all of them, so that the result of any may be looked at.
"""

import hashlib
import json
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from bnb_core import BnbError, nn, optim
from bnb_core.integrations import bitsandbytes_alias
from bnb_core.ops import dequantize_blockwise

FEATURES, HIDDEN, RANK_OF_ADAPTERS = 256, 320, 8


class Adapted(torch.nn.Module):
    """A frozen quantized layer with a trained product of two thin matrices beside it (LoRA, arXiv 2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A = torch.nn.Linear(base.in_features, RANK_OF_ADAPTERS, bias=False)
        self.lora_B = torch.nn.Linear(RANK_OF_ADAPTERS, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def quantized_layer(kind, inputs, outputs):
    if kind == "int8":
        return nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=6.0)
    return nn.LinearNF4(inputs, outputs, quant_storage=getattr(torch, kind))


class Network(torch.nn.Module):
    """Two layers with adapters, and a trained one of which the rows are no multiple of anything."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.up = Adapted(quantized_layer(kind, FEATURES, HIDDEN))
        self.down = Adapted(quantized_layer(kind, HIDDEN, FEATURES))
        self.head = torch.nn.Linear(FEATURES, 5)
        for layer in (self.up, self.down):
            layer.base.requires_grad_(False)
        self.to("cpu")  # quantizes

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


class Dense(torch.nn.Module):
    """Layers without quantized weights, of these sizes. Only one rank has anything of the last, which has one row."""

    def __init__(self, *sizes):
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(inputs, outputs) for inputs, outputs in zip((FEATURES, *sizes), (*sizes, 1))]
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def with_peft(kind):
    """Let peft put the adapters in."""
    bitsandbytes_alias.enable(force=True)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = [quantized_layer(kind, FEATURES, HIDDEN), torch.nn.ReLU(), quantized_layer(kind, HIDDEN, FEATURES)]
    base = torch.nn.Sequential(*layers, torch.nn.Linear(FEATURES, 5)).requires_grad_(False).to("cpu")
    config = LoraConfig(r=RANK_OF_ADAPTERS, lora_alpha=8, target_modules=["0", "2"], init_lora_weights="gaussian")
    return get_peft_model(base, config)


def build(name):
    kind, _, source = name.partition("+")
    if kind == "blocks":
        return Dense(256)  # rows of whole blocks
    if kind == "rows":
        return Dense(257, 512, 300, 300)  # an odd number of rows, rows of a prime number of elements, and of a block and a part
    return with_peft(kind) if source == "peft" else Network(kind)


def shard(model, **options):
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for module in model.modules():
        if isinstance(module, Adapted):
            fully_shard(module, **options)
    model = fully_shard(model, **options)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return model


def distribute(model, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        return shard(model)
    if how == "fsdp-mixed":
        return shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    if how == "fsdp-offload":
        return shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    if how == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if how == "hsdp":
        return shard(model, mesh=init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard")))
    assert how == "alone"
    return model


def optimizer_for(model, name):
    options = {"momentum": 0.9} if name.startswith("SGD") else {}
    params = [param for param in model.parameters() if param.requires_grad]
    return getattr(optim, name)(params, lr=3e-3, min_8bit_size=300, **options)


def batch(step, split):
    """Return the inputs of a step: all of them in each process, or to each process its part."""
    x = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(step))
    return x.chunk(dist.get_world_size())[dist.get_rank()] if split else x


def steps(model, optimizer, numbers, split=False):
    losses = []
    for step in numbers:
        optimizer.zero_grad()
        loss = (model(batch(step, split)).float() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(tensor):
    """Return what is equal for equal numbers only."""
    return hashlib.sha256(whole(tensor).detach().double().contiguous().numpy().tobytes()).hexdigest()


def dequantized(codes, absmax, codebook, sharded):
    if absmax.shape[0] == 2 == codes.shape[0]:  # the two halves of a state
        return torch.stack([dequantized(*half, codebook, sharded) for half in zip(codes, absmax)])
    blocksize = codes.numel() // absmax.numel() if sharded else 256
    values = dequantize_blockwise(codes.flatten(), absmax.flatten(), codebook, blocksize, torch.float32)
    return values.view(codes.shape)


def values_of_states(model, optimizer):
    """Return what states stand for, by the name of their parameter, and the dtypes and shapes that they are kept in."""
    values, kept = {}, {}
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        for number in (1, 2, 3):
            codes = state.get(f"state{number}")
            if codes is None:
                continue
            assert isinstance(codes, DTensor) == isinstance(param, DTensor)
            codes, key = whole(codes), f"{name.replace('module.', '')}.{number}"
            if codes.dtype == torch.uint8:
                absmax = state[f"absmax{number}"]
                assert isinstance(absmax, DTensor) == isinstance(param, DTensor)
                absmax = whole(absmax)
                kept[key] = ["uint8", list(absmax.shape)]
                codes = dequantized(codes, absmax, state[f"qmap{number}"], sharded=isinstance(param, DTensor))
            else:
                kept[key] = [str(codes.dtype)[len("torch.") :], list(codes.shape)]
            values[key] = codes
    return values, kept


def snapshot(model, optimizer):
    values, kept = values_of_states(model, optimizer)
    trained = {name.replace("module.", ""): digest(p) for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        output = digest(model(batch(99, split=False)))
    states = {key: digest(tensor) for key, tensor in values.items()}
    return {"parameters": trained, "states": states, "kept": kept, "output": output}


# ------------------------------------------------------------------------------------------------------------------------- tasks


def train(name, how, optimizer, split=False):
    """Train a model for some steps."""
    model = distribute(build(name), how)
    optimizer = optimizer_for(model, optimizer)
    losses = steps(model, optimizer, range(5), split)
    return {"losses": losses, **snapshot(model, optimizer)}


def save(name, how, optimizer, folder):
    """Train for some steps, and write a sharded checkpoint."""
    model = distribute(build(name), how)
    optimizer = optimizer_for(model, optimizer)
    steps(model, optimizer, range(3))
    before = snapshot(model, optimizer)
    states = get_state_dict(getattr(model, "module", model), optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states)), checkpoint_id=folder)
    return {**before, "losses": steps(model, optimizer, range(3, 5))}


def load(name, how, optimizer, folder):
    """Read a sharded checkpoint into a model of which everything is zero, and train on."""
    model = build(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear4bit):
                module.quant_state.absmax.zero_()
            if isinstance(module, nn.Linear8bitLt):
                module.weight.SCB.zero_()
        for param in model.parameters():
            param.data.zero_()
    model = distribute(model, how)
    optimizer = optimizer_for(model, optimizer)
    inner = getattr(model, "module", model)
    states = dict(zip(("model", "optimizer"), get_state_dict(inner, optimizer)))
    states = tree_map_only(torch.Tensor, torch.clone, states)  # so that nothing is read straight to where it belongs
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(inner, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return {**snapshot(model, optimizer), "losses": steps(model, optimizer, range(3, 5))}


def exchange(name, optimizer):
    """Bring states from a sharded model into one that is not, and back; return how much they differ each time."""
    sharded = shard(build(name))
    trained = optimizer_for(sharded, optimizer)
    steps(sharded, trained, range(2))
    whole_states = StateDictOptions(full_state_dict=True)
    gathered = get_optimizer_state_dict(sharded, trained, options=whole_states)
    model = build(name)
    gathering = optimizer_for(model, optimizer)
    set_optimizer_state_dict(model, gathering, gathered)
    # And once more with states that were never sharded.
    fresh = optimizer_for(model, optimizer)
    steps(model, fresh, range(2))
    sharded.zero_grad()  # with gradients, torch does not make the states that it has to know the places of
    scattering, loading = (optimizer_for(sharded, optimizer) for _ in range(2))
    set_optimizer_state_dict(sharded, scattering, get_optimizer_state_dict(model, fresh), options=whole_states)
    loading.load_state_dict(fresh.state_dict())
    changes = {
        "gathered": differences(values_of_states(sharded, trained), values_of_states(model, gathering)),
        "scattered": differences(values_of_states(model, fresh), values_of_states(sharded, scattering)),
        "loaded": differences(values_of_states(model, fresh), values_of_states(sharded, loading)),
    }
    for model_of_it, other in ((model, gathering), (sharded, scattering), (sharded, loading)):
        steps(model_of_it, other, range(2, 3))  # each works on
    return changes


def differences(before, after):
    (expected, _), (found, kept) = before, after
    assert expected.keys() == found.keys()
    changes = {key: (found[key] - expected[key]).abs().max() / expected[key].abs().max() for key in found}
    return {key: [kept[key][0], change.item()] for key, change in changes.items()}


def gather(name):
    """Bring a model's weights from sharded layers into layers that are not, and back into sharded ones."""
    model = build(name)
    expected = model(batch(0, split=False))
    sharded, whole_weights = shard(model), StateDictOptions(full_state_dict=True)
    gathered = get_model_state_dict(sharded, options=whole_weights)
    alone = build(name)
    with torch.no_grad():
        for param in (*alone.parameters(), *sharded.parameters()):
            param.zero_()
    alone.load_state_dict(gathered)
    set_model_state_dict(sharded, gathered, options=whole_weights)
    return [torch.equal(result(batch(0, split=False)), expected) for result in (alone, sharded)]


def cast(name):
    """Move and cast a sharded model, as is done to any other, before and during its training."""
    model = build(name)
    expected = model(batch(0, split=False))
    model = shard(model).to(torch.float64).to("cpu").float()
    same = torch.equal(model(batch(0, split=False)), expected)
    model.reshard()  # as the backward would have done
    optimizer = optimizer_for(model, "AdamW")
    losses = steps(model, optimizer, range(3))
    model.double().float()  # puts other memory in the place of the shards
    return {"same": same, "losses": losses + steps(model, optimizer, range(3, 5))}


def refusal(function):
    try:
        function()
    except BnbError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def refusals():
    """Do what cannot be done, and return the errors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = batch(0, split=False)
    sharded_x = distribute_tensor(x, mesh, [Shard(0)])
    found = {}
    for kind in ("uint8", "float32", "int8"):
        model = Network(kind)
        found[f"{kind} activation"] = refusal(lambda model=model: model.up.base(sharded_x))
        fully_shard(model, mesh=mesh)
        found[f"{kind} weight"] = refusal(lambda model=model: model.up.base(x))
    mixed = distribute(Network("float32"), "fsdp-mixed")
    found["mixed precision"] = refusal(lambda: mixed(x))
    model = distribute(build("blocks"), "fsdp")
    lamb = optim.LAMB8bit(model.parameters(), lr=1e-3)
    model(x).sum().backward()
    found["norm"] = refusal(lamb.step)
    adam = optim.AdamW8bit(model.parameters(), lr=1e-3)
    adam.step()
    states = adam.state_dict()
    states["state"][0]["__bnb_optimizer_quant_state__"]["absmax1"] = torch.zeros(FEATURES, 2)
    states["state"][0]["__bnb_optimizer_quant_state__"]["state1"] = torch.zeros(FEATURES + 1, FEATURES, dtype=torch.uint8)
    found["states"] = refusal(lambda: adam.load_state_dict(states))
    whole_weights = {name: whole(tensor) for name, tensor in distribute(Network("float32"), "fsdp").state_dict().items()}
    sharded, alone = distribute(Network("float32"), "fsdp"), Network("float32")
    found["whole into sharded"] = refusal(lambda: sharded.load_state_dict(whole_weights))
    found["sharded into whole"] = refusal(lambda: alone.load_state_dict(sharded.state_dict()))
    return found


def step(optimizer, how):
    """Step a parameter that is placed in some way, or not at all; return its value and the dtype of its states."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    param, grad = torch.randn(30, 100), torch.randn(30, 100)
    if how == "replicated":  # and each process has a summand of the gradient, as tensor parallelism leaves it
        param = distribute_tensor(param, mesh, [Replicate()])
        grad = DTensor.from_local(grad / dist.get_world_size(), mesh, [Partial()])
    if how == "columns":
        param, grad = (distribute_tensor(tensor, mesh, [Shard(1)]) for tensor in (param, grad))
    param = torch.nn.Parameter(param)
    stepping = getattr(optim, optimizer)([param], lr=1e-2, min_8bit_size=300)
    for _ in range(3):
        param.grad = grad
        stepping.step()
    return [digest(param), str(stepping.state[param]["state1"].dtype)]


def main():
    torch.set_num_threads(1)
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"result": globals()[name](*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
