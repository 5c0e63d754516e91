"""Each algorithm against a float64 implementation of its formulas, step by step from the same state, and against torch.optim."""

import math

import pytest
import torch

from bnb_core import optim
from bnb_core.ops import dequantize_blockwise
from bnb_core.quantization.codebooks import create_dynamic_map

SIZES = (1, 255, 256, 257, 4097)
STEPS = 50
#: How far a value may be off in float32, relative to the terms that it is made of: some ten roundings.
ERROR = 2.0**-20


# ------------------------------------------------------------------------ the formulas, in float64


def adam(g, s, t, o):
    beta1, beta2 = o["betas"]
    m, v = beta1 * s["m"] + (1 - beta1) * g, beta2 * s["v"] + (1 - beta2) * g**2
    after = {"m": m, "v": v}
    if o.get("amsgrad"):
        v = after["w"] = torch.maximum(s["w"], v)
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if o.get("bias_correction", True) else (1.0, 1.0)
    return (m / c1) / ((v / c2).sqrt() + o["eps"]), after


def ademamix(g, s, t, o):
    beta1, beta2, beta3 = o["betas"]
    alpha = o["alpha"]
    if o.get("t_alpha"):
        alpha = min(alpha * t / o["t_alpha"], alpha)
    if o.get("t_beta3"):
        done, log1, log3 = t / o["t_beta3"], math.log(beta1), math.log(beta3)
        beta3 = min(math.exp(log1 * log3 / ((1 - done) * log3 + done * log1)), beta3)
    fast, slow = beta1 * s["m"] + (1 - beta1) * g, beta3 * s["n"] + (1 - beta3) * g
    v = beta2 * s["v"] + (1 - beta2) * g**2
    u = (fast / (1 - beta1**t) + alpha * slow) / ((v / (1 - beta2**t)).sqrt() + o["eps"])
    return u, {"m": fast, "n": slow, "v": v}


def lion(g, s, t, o):
    beta1, beta2 = o["betas"]
    return (beta1 * s["m"] + (1 - beta1) * g).sign(), {"m": beta2 * s["m"] + (1 - beta2) * g}


def sgd(g, s, t, o):
    if not o.get("momentum"):
        return g, {}
    b = g if t == 1 else o["momentum"] * s["b"] + (1 - o.get("dampening", 0)) * g
    return g + o["momentum"] * b if o.get("nesterov") else b, {"b": b}


def rmsprop(g, s, t, o):
    alpha = o["alpha"]
    after = {"v": alpha * s["v"] + (1 - alpha) * g**2}
    spread = after["v"]
    if o.get("centered"):
        after["a"] = alpha * s["a"] + (1 - alpha) * g
        spread = (after["v"] - after["a"] ** 2).clamp(min=0.0)  # it can be negative where states are 8-bit
    u = g / (spread.sqrt() + o["eps"])
    if o.get("momentum"):
        u = after["b"] = o["momentum"] * s["b"] + u
    return u, after


def adagrad(g, s, t, o):
    total = s["h"] + g**2
    return g / (total.sqrt() + o["eps"]) / (1 + (t - 1) * o.get("lr_decay", 0)), {"h": total}


def step64(algorithm, decoupled, p, g, s, t, o):
    """Take a step in float64 from these states.

    Returns the parameter, the states, how large a direction is, and how large the terms are that each state is a sum of: that is
    what rounding errors are relative to.
    """
    decay, limit = o.get("weight_decay", 0), o.get("max_unorm", 0)
    finite = torch.isfinite(g)
    g = torch.where(finite, g, torch.zeros_like(g))
    u, after = algorithm(g if decoupled else g + decay * p, s, t, o)
    _, terms = algorithm(g.abs() if decoupled else g.abs() + decay * p.abs(), {name: x.abs() for name, x in s.items()}, t, o)
    if algorithm is rmsprop and "b" in terms:  # its quotients do not grow with their terms
        terms["b"] = (after["b"].abs() + s["b"].abs()).max()
    u = torch.where(finite, u, torch.zeros_like(u))
    scale = 1.0
    if limit and p.norm() > 0 and u.norm() > limit * p.norm():
        scale = float(limit * p.norm() / u.norm())
    moved = (p * (1 - o["lr"] * decay) if decoupled else p) - o["lr"] * scale * u
    after = {name: torch.where(finite, value, s[name]) for name, value in after.items()}
    return torch.where(finite, moved, p), after, float((scale * u).abs().max()), terms


# --------------------------------------------------------------------------------------- the cases

#: Class, its formula, whether decay is decoupled, names of its states as (key, half, name in the formula), and options.
M_V_W = (("state1", None, "m"), ("state2", None, "v"), ("state3", None, "w"))
FAMILIES = {
    "Adam": (adam, True, M_V_W),
    "AdamW": (adam, True, M_V_W),
    "LAMB": (adam, True, M_V_W),
    "AdEMAMix": (ademamix, True, (("state1", 0, "m"), ("state1", 1, "n"), ("state2", None, "v"))),
    "Lion": (lion, True, (("state1", None, "m"),)),
    "SGD": (sgd, False, (("state1", None, "b"),)),
    "LARS": (sgd, False, (("state1", None, "b"),)),
    "RMSprop": (rmsprop, False, (("state1", None, "v"), ("state2", None, "b"), ("state3", None, "a"))),
    "Adagrad": (adagrad, False, (("state1", None, "h"),)),
}
ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
CASES = [
    ("Adam", {**ADAM}),
    ("Adam", {**ADAM, "amsgrad": True, "betas": (0.8, 0.9)}),
    ("AdamW", {**ADAM, "weight_decay": 0.3}),
    ("LAMB", {**ADAM, "weight_decay": 0.1, "max_unorm": 0.5}),
    ("LAMB", {**ADAM, "weight_decay": 0.1, "max_unorm": 1.0, "adam_w_mode": False, "bias_correction": False, "amsgrad": True}),
    ("AdEMAMix", {**ADAM, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "weight_decay": 0.1}),
    ("AdEMAMix", {**ADAM, "betas": (0.8, 0.95, 0.99), "alpha": 3.0, "t_alpha": 20, "t_beta3": 30, "weight_decay": 0.0}),
    ("Lion", {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.2}),
    ("SGD", {"lr": 1e-2, "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    ("LARS", {"lr": 1e-1, "momentum": 0.9, "weight_decay": 0.01, "max_unorm": 0.02}),
    ("RMSprop", {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 1e-2, "alpha": 0.9, "eps": 1e-6, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 1e-1, "eps": 1e-10, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
]
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])


def rounding(values, dtype):
    """Return half the distance between neighbouring numbers of a dtype near these float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp(min=info.tiny)))
    return 0.5 * info.eps * torch.exp2(exponent)


def make(name, options, dtype=torch.float32, **format):
    options = dict(options)
    lr = options.pop("lr")
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in SIZES]
    return params, getattr(optim, name)(params, lr, **options, **format)


def gradients(params, t):
    """Give each parameter a gradient; from time to time some elements of it are not finite, or zero."""
    for param in params:
        param.grad = torch.randn_like(param) * (10.0 ** torch.empty(param.shape).uniform_(-3, 1)).to(param.dtype)
        if t % 5 == 3:
            param.grad[::7] = math.nan
            param.grad[3::11] = math.inf
            param.grad[5::13] = 0.0


def is_near_tie(name, g, s, o):
    """Say where the sign that Lion takes hangs on a rounding."""
    if name != "Lion":
        return torch.zeros_like(g, dtype=torch.bool)
    beta1 = o["betas"][0]
    return (beta1 * s["m"] + (1 - beta1) * g).abs() <= 2.0**-22 * ((beta1 * s["m"]).abs() + g.abs())


def read(state, name, half, param, options):
    """Return a 32-bit state in float64; what it starts with if it is not there yet."""
    if name not in state:
        return torch.full(param.shape, options.get("initial_accumulator_value", 0.0), dtype=torch.float64)
    return (state[name] if half is None else state[name][half]).double()


def check_params(name, options, dtype, t, param, p, g, s):
    """Compare a parameter after a step; return the states to compare, and how large their terms are."""
    algorithm, decoupled, _ = FAMILIES[name]
    expected, after, size, terms = step64(algorithm, options.get("adam_w_mode", decoupled), p, g, s, t, options)
    tolerance = 1.01 * rounding(expected, dtype) + (options["lr"] * size * ERROR + p.abs() * 2.0**-23)
    updated = param.detach().double()
    wrong = (updated - expected).abs() > tolerance
    assert not (wrong & ~is_near_tie(name, g, s, options)).any(), f"step {t}"
    left_alone = ~torch.isfinite(g)
    assert torch.equal(updated[left_alone], p[left_alone])
    return after, terms


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_32bit_states(name, options, dtype):
    params, optimizer = make(name, options, dtype)
    names = FAMILIES[name][2]
    for t in range(1, (STEPS if dtype is torch.float32 else 6) + 1):
        gradients(params, t)
        before = [
            (p.detach().double(), {key: read(optimizer.state[p], of, half, p, options) for of, half, key in names}) for p in params
        ]
        optimizer.step()
        for param, (p, s) in zip(params, before):
            g = param.grad.double()
            after, terms = check_params(name, options, dtype, t, param, p, g, s)
            left_alone = ~torch.isfinite(g)
            kept = {key: read(optimizer.state[param], of, half, param, options) for of, half, key in names if key in after}
            for key, value in kept.items():
                assert ((value - after[key]).abs() <= ERROR * terms[key]).all(), (key, t)
                assert torch.equal(value[left_alone], s[key][left_alone])
    assert all(state["step"] == STEPS or dtype is not torch.float32 for state in optimizer.state.values())


# ------------------------------------------------------------------------------------ 8-bit states

CODEBOOKS = {"signed": create_dynamic_map(True), "unsigned": create_dynamic_map(False)}
#: Adam's, and AdEMAMix's, mean square has unsigned codes; what is a mean square elsewhere has signed ones, as in bitsandbytes.
UNSIGNED = {("adam", "v"), ("adam", "w"), ("ademamix", "v")}


def read_8bit(state, name, half, param, codebook, options):
    """Return codes, block scales, and the values that they stand for."""
    if name not in state:
        return None, None, read({}, name, half, param, options)
    number = name[-1]
    assert torch.equal(state[f"qmap{number}"], codebook)
    codes, absmax = state[name], state[f"absmax{number}"]
    if half is not None:
        codes, absmax = codes[half], absmax[half]
    return codes.clone(), absmax.clone(), dequantize_blockwise(codes, absmax, codebook, 256, torch.float32).double()


def check_codes(codes, absmax, expected, terms, codebook, key):
    """Codes are those of the float64 values, except next to a midpoint, where they may be one further.

    "Next to" means within what float32 can be off by: 2^-20 relative to the value, or to the larger terms of which it is the sum.
    """
    n = expected.numel()
    blocks, terms = (torch.nn.functional.pad(x.expand(n), (0, -n % 256)).view(-1, 256) for x in (expected, terms))
    largest = blocks.abs().amax(1)
    assert ((absmax.double() - largest).abs() <= ERROR * terms.amax(1)).all(), key
    scale = 1.0 / absmax.double().clamp(min=2.0**-126)[:, None]
    scaled, terms = ((x * scale).view(-1)[:n] for x in (blocks, terms))
    midpoints = (codebook.double()[:-1] + codebook.double()[1:]) / 2
    nearest = torch.bucketize(scaled, midpoints)
    off = codes.long() - nearest
    assert off.abs().max() <= 1, key
    differs = off != 0
    crossed = midpoints[torch.where(off > 0, nearest, nearest - 1)[differs]]
    assert ((scaled[differs] - crossed).abs() <= 2.0**-20 * torch.maximum(crossed.abs(), terms[differs])).all(), key


@cases
def test_8bit_states(name, options):
    params, optimizer = make(name, options, optim_bits=8, min_8bit_size=0)
    algorithm, _, names = FAMILIES[name]
    codebooks = {key: CODEBOOKS["unsigned" if (algorithm.__name__, key) in UNSIGNED else "signed"] for _, _, key in names}
    for t in range(1, STEPS + 1):
        gradients(params, t)
        before = []
        for p in params:
            s = {key: read_8bit(optimizer.state[p], of, half, p, codebooks[key], options)[2] for of, half, key in names}
            before.append((p.detach().double(), s))
        optimizer.step()
        for param, (p, s) in zip(params, before):
            after, terms = check_params(name, options, torch.float32, t, param, p, param.grad.double(), s)
            for of, half, key in names:
                if key in after and of in optimizer.state[param]:
                    codes, absmax, _ = read_8bit(optimizer.state[param], of, half, param, codebooks[key], options)
                    check_codes(codes, absmax, after[key], terms[key], codebooks[key], (key, t))


# ------------------------------------------------------------------------------------- torch.optim

SAME_AS_TORCH = [
    ("AdamW", "AdamW", {"weight_decay": 0.1}),
    ("AdamW", "AdamW", {"weight_decay": 0.1, "amsgrad": True, "betas": (0.5, 0.7)}),
    ("Adam", "Adam", {"eps": 1e-3}),
    ("SGD", "SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", "RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", "RMSprop", {"centered": True, "momentum": 0.9, "alpha": 0.9}),
    ("Adagrad", "Adagrad", {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "initial_accumulator_value": 0.3}),
]


@pytest.mark.parametrize(("name", "theirs", "options"), SAME_AS_TORCH)
def test_follows_torch_optim_for_50_steps(name, theirs, options):
    start = [torch.randn(30, 40), torch.randn(7)]
    ours, others = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = {"lr": 1e-2, **options}
    optimizer, other = getattr(optim, name)(ours, **options), getattr(torch.optim, theirs)(others, **options)
    for _ in range(STEPS):
        for p, q in zip(ours, others):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    for p, q in zip(ours, others):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def test_lars_follows_pytorch_lars_for_50_steps():
    start = [torch.randn(30, 40), torch.randn(7), torch.zeros(5)]
    ours, others = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "max_unorm": 0.02}
    optimizer, other = optim.LARS(ours, **options), optim.PytorchLARS(others, **options)
    for _ in range(STEPS):
        for p, q in zip(ours, others):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
    for p, q in zip(ours, others):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert ours[2].abs().min() > 0  # a parameter of zeros has no norm to be held to


def test_sgd_without_momentum_keeps_no_state():
    param = torch.nn.Parameter(torch.randn(5000))
    optimizer = optim.SGD8bit([param], lr=0.5)
    param.grad = torch.ones_like(param)
    expected = param.detach() - 0.5
    optimizer.step()
    assert torch.equal(param, expected)
    assert set(optimizer.state[param]) == {"step"}
