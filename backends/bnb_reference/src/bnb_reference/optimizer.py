"""Optimizer steps: read a piece of a parameter and its states, apply the rule, write it back.

Arithmetic on elements is float32. What depends on hyperparameters, step and learning rate alone is worked out in float64, and
rounded once, where it meets the elements.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from bnb_core.ops.spec import Hyperparameters
from bnb_reference import kernel
from bnb_reference.blocks import pieces
from bnb_reference.dequantize import dequantize_blockwise
from bnb_reference.devices import piece_size, reads_are_free
from bnb_reference.quantize import quantize_blockwise

Tensors = Sequence[torch.Tensor]
Number = Union[float, torch.Tensor]
#: Three states, None where the algorithm has none.
Values = Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]


@kernel("optimizer_step_32bit_")
def optimizer_step_32bit_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
) -> None:
    """Update each parameter and its float32 states."""
    rule = _Rule(algorithm, hyperparameters, step, lr, params[0].device)
    for i, (param, grad) in enumerate(zip(params, grads)):
        states = [_State32bit(tensors[i]) if tensors else None for tensors in (state1, state2, state3)]
        _update(rule, param, grad, states, blocksize=1)


@kernel("optimizer_step_8bit_blockwise_")
def optimizer_step_8bit_blockwise_(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    state3: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    absmax3: Tensors,
    codebook1: Optional[torch.Tensor],
    codebook2: Optional[torch.Tensor],
    codebook3: Optional[torch.Tensor],
    algorithm: str,
    hyperparameters: Hyperparameters,
    step: Number,
    lr: Number,
    blocksize: int,
) -> None:
    """Update each parameter and its states, which are dequantized and quantized again a piece at a time."""
    rule = _Rule(algorithm, hyperparameters, step, lr, params[0].device)
    formats = ((state1, absmax1, codebook1), (state2, absmax2, codebook2), (state3, absmax3, codebook3))
    for i, (param, grad) in enumerate(zip(params, grads)):
        states = [
            _State8bit(codes[i], absmax[i], codebook, blocksize) if codebook is not None and codes else None
            for codes, absmax, codebook in formats
        ]
        _update(rule, param, grad, states, blocksize)


# ----------------------------------------------------------------------------------------------------------------- states in memory


class _State32bit:
    """A float32 state of a parameter, in storage order."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = _in_storage_order(values)

    def read(self, elements: slice, blocks: slice) -> torch.Tensor:
        return self._values[elements]

    def write(self, elements: slice, blocks: slice, values: torch.Tensor) -> None:
        self._values[elements] = values


class _State8bit:
    """A blockwise quantized state of a parameter, in storage order."""

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, codebook: torch.Tensor, blocksize: int) -> None:
        self._codes = _in_storage_order(codes)
        self._absmax = absmax.view(-1)
        self._codebook = codebook
        self._blocksize = blocksize

    def read(self, elements: slice, blocks: slice) -> torch.Tensor:
        codes = self._codes[elements]
        values = torch.empty_like(codes, dtype=torch.float32)
        dequantize_blockwise(codes, self._absmax[blocks], self._codebook, self._blocksize, out=values)
        return values

    def write(self, elements: slice, blocks: slice, values: torch.Tensor) -> None:
        quantize_blockwise(values, self._codebook, self._blocksize, out=(self._codes[elements], self._absmax[blocks]))


#: Pieces are as much smaller than those of other kernels, because a rule has that many more tensors of them at once.
_TENSORS_AT_ONCE = 8

_State = Union[_State32bit, _State8bit]


def _in_storage_order(tensor: torch.Tensor) -> torch.Tensor:
    """View a dense tensor as one dimension, whatever the order of its strides."""
    return tensor.as_strided((tensor.numel(),), (1,))


# -------------------------------------------------------------------------------------------------------------------------- a step


class _Piece(NamedTuple):
    """A part of a parameter with what the step makes of it."""

    elements: slice
    blocks: slice
    param: torch.Tensor
    """float32, before the step."""
    updated: torch.Tensor
    """Which elements the step changes."""
    direction: torch.Tensor
    """u of the spec; zero where nothing changes."""
    states: Values
    """After the step."""


def _update(rule: "_Rule", param: torch.Tensor, grad: torch.Tensor, states: Sequence[Optional[_State]], blocksize: int) -> None:
    """Take one step of one parameter."""
    param, grad = _in_storage_order(param), _in_storage_order(grad)
    h = rule.hyperparameters
    rate = rule.lr
    if h.max_unorm > 0.0:
        # The norms need all pieces, which are then worked out a second time rather than kept.
        norms = [(_norm(piece.param), _norm(piece.direction)) for piece in _pieces(rule, param, grad, states, blocksize)]
        rate = rate * _trust_ratio(h.max_unorm, *(_norm(torch.stack(column)) for column in zip(*norms)))
    for piece in _pieces(rule, param, grad, states, blocksize):
        decayed = piece.param * (1.0 - rule.lr * h.weight_decay) if h.decoupled_weight_decay else piece.param
        param[piece.elements] = torch.where(piece.updated, decayed - rate * piece.direction, piece.param).to(param.dtype)
        for state, values in zip(states, piece.states):
            if state is not None and values is not None:
                state.write(piece.elements, piece.blocks, values)


def _pieces(
    rule: "_Rule", param: torch.Tensor, grad: torch.Tensor, states: Sequence[Optional[_State]], blocksize: int
) -> Iterator[_Piece]:
    """Work out the step of each piece, writing nothing."""
    h = rule.hyperparameters
    for elements, blocks in pieces(param.numel(), blocksize, max(piece_size(param.device) // _TENSORS_AT_ONCE, blocksize)):
        p, g = param[elements].float(), grad[elements].float()
        updated = torch.isfinite(g)
        if h.skip_zeros:
            updated &= g != 0.0
        g = torch.where(updated, g, torch.zeros_like(g)) * h.gnorm_scale
        if h.weight_decay and not h.decoupled_weight_decay:
            g = g + h.weight_decay * p
        before = [None if state is None else state.read(elements, blocks) for state in states]
        direction, after = rule(g, *before)
        kept = [None if old is None or new is None else torch.where(updated, new, old) for old, new in zip(before, after)]
        direction = torch.where(updated, direction, torch.zeros_like(direction))
        yield _Piece(elements, blocks, p, updated, direction, (kept[0], kept[1], kept[2]))


def _norm(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dtype=_wide(values.device))


def _trust_ratio(max_unorm: float, param_norm: torch.Tensor, direction_norm: torch.Tensor) -> torch.Tensor:
    """Return what to multiply a direction with that is longer than `max_unorm` parameters."""
    limit = max_unorm * param_norm
    too_long = (param_norm > 0.0) & (direction_norm > limit)
    return torch.where(too_long, limit / direction_norm, torch.ones_like(limit))


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


# ----------------------------------------------------------------------------------------------------------------------- the rules


class _Rule:
    """An update rule with its scalars: gradient and states before the step -> direction and states after it.

    Step and learning rate become tensors without dimensions, on the CPU if they were numbers: then one way of writing the rules
    serves both, and those on a device are never read.
    """

    def __init__(self, algorithm: str, hyperparameters: Hyperparameters, step: Number, lr: Number, device: torch.device) -> None:
        self.hyperparameters = hyperparameters
        self.step = _scalar(step, device)
        self.lr = _scalar(lr, device)
        self._apply = _RULES[algorithm]

    def __call__(self, g: torch.Tensor, *states: Optional[torch.Tensor]) -> Tuple[torch.Tensor, Values]:
        return self._apply(self, g, *states)

    def bias_corrections(self) -> Tuple[Number, Number]:
        """Return c1 and c2 of the spec."""
        h = self.hyperparameters
        if not h.bias_correction:
            return 1.0, 1.0
        return 1.0 - torch.pow(h.beta1, self.step), (1.0 - torch.pow(h.beta2, self.step)).sqrt()

    def scheduled_alpha(self) -> Number:
        """Return alpha_t of AdEMAMix: it grows to alpha over t_alpha steps."""
        h = self.hyperparameters
        return torch.clamp(self.step * (h.alpha / h.t_alpha), max=h.alpha) if h.t_alpha else h.alpha

    def scheduled_beta3(self) -> Number:
        """Return beta3_t of AdEMAMix: it grows from beta1 to beta3 over t_beta3 steps."""
        h = self.hyperparameters
        if not (h.t_beta3 and h.beta3):
            return h.beta3
        # The formula of the spec, divided by ln beta1: this also has the limit for beta1 = 0.
        ratio = math.log(h.beta3) / math.log(h.beta1) if h.beta1 else 0.0
        done = self.step / h.t_beta3
        return torch.clamp(torch.exp(math.log(h.beta3) / (ratio + done * (1.0 - ratio))), max=h.beta3)

    def at_first_step(self, first: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        """Choose by whether this is step 1."""
        is_first = self.step == 1
        if reads_are_free(is_first.device):
            return first if is_first else later
        return torch.where(is_first, first, later)


def _scalar(value: Number, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(_wide(device))
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _mean(beta: Number, average: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the exponential moving average with a new value."""
    return average * beta + new * (1.0 - beta)


def _adam(rule: _Rule, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, w: Optional[torch.Tensor]) -> Tuple[torch.Tensor, Values]:
    h = rule.hyperparameters
    m = _mean(h.beta1, m, g)
    v = _mean(h.beta2, v, g * g)
    w = None if w is None else torch.maximum(w, v)
    c1, c2 = rule.bias_corrections()
    return (m / c1) / ((v if w is None else w).sqrt() / c2 + h.eps), (m, v, w)


def _ademamix(rule: _Rule, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, n: torch.Tensor) -> Tuple[torch.Tensor, Values]:
    h = rule.hyperparameters
    m = _mean(h.beta1, m, g)
    n = _mean(rule.scheduled_beta3(), n, g)
    v = _mean(h.beta2, v, g * g)
    c1, c2 = rule.bias_corrections()
    return (m / c1 + n * rule.scheduled_alpha()) / (v.sqrt() / c2 + h.eps), (m, v, n)


def _lion(rule: _Rule, g: torch.Tensor, m: torch.Tensor, *_: None) -> Tuple[torch.Tensor, Values]:
    h = rule.hyperparameters
    return _mean(h.beta1, m, g).sign(), (_mean(h.beta2, m, g), None, None)


def _sgd(rule: _Rule, g: torch.Tensor, b: Optional[torch.Tensor], *_: None) -> Tuple[torch.Tensor, Values]:
    h = rule.hyperparameters
    if b is None:
        return g, (None, None, None)
    b = rule.at_first_step(g, b * h.momentum + g * (1.0 - h.dampening))
    return g + b * h.momentum if h.nesterov else b, (b, None, None)


def _rmsprop(
    rule: _Rule, g: torch.Tensor, v: torch.Tensor, b: Optional[torch.Tensor], a: Optional[torch.Tensor]
) -> Tuple[torch.Tensor, Values]:
    h = rule.hyperparameters
    v = _mean(h.beta2, v, g * g)
    d = v
    if a is not None:
        a = _mean(h.beta2, a, g)
        d = (v - a * a).clamp_(min=0.0)
    q = g / (d.sqrt() + h.eps)
    if b is None:
        return q, (v, None, a)
    b = b * h.momentum + q
    return b, (v, b, a)


def _adagrad(rule: _Rule, g: torch.Tensor, total: torch.Tensor, *_: None) -> Tuple[torch.Tensor, Values]:
    h = rule.hyperparameters
    total = total + g * g
    return g / ((total.sqrt() + h.eps) * (1.0 + (rule.step - 1.0) * h.lr_decay)), (total, None, None)


_RULES: Dict[str, Callable[..., Tuple[torch.Tensor, Values]]] = {
    "adam": _adam,
    "ademamix": _ademamix,
    "lion": _lion,
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}
