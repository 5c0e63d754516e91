"""Backends that are wrong in one thing each: the reference's kernels with a small fault."""

from __future__ import annotations

from typing import Callable, Dict, NamedTuple

import torch

from bnb_core.ops.spec import ABSMAX_FLOOR, Nested
from bnb_core.testing.loopback import Wrapper


class Fault(NamedTuple):
    wrappers: Dict[str, Wrapper]
    """By op, what becomes of the reference's kernel."""
    caught_by: str
    """Test of the conformance suite that has to fail."""
    among: str
    """pytest's `-k` expression for the cases of it that are run."""


FAULTS: Dict[str, Fault] = {}


def fault(*ops: str, caught_by: str, among: str = "") -> Callable[[Wrapper], Wrapper]:
    """Define a wrong backend: the decorated function makes a wrong kernel of a right one."""

    def add(wrapper: Wrapper) -> Wrapper:
        FAULTS[wrapper.__name__] = Fault(dict.fromkeys(ops, wrapper), caught_by, among)
        return wrapper

    return add


def _requantize(x, codebook, blocksize, out, scaled):
    """Fill `out` as the reference does, from values that were scaled otherwise."""
    codes, absmax = out
    n, blocks = x.numel(), absmax.numel()
    rows = torch.zeros(blocks * blocksize)
    rows[:n] = x.reshape(-1).float()
    rows = rows.view(blocks, blocksize)
    absmax.copy_(rows.abs().amax(1))
    entries, order = torch.sort(codebook, stable=True)
    s = torch.nan_to_num(scaled(rows, absmax[:, None])).view(-1)[:n]
    codes.copy_(order[torch.bucketize(s, (entries[:-1] + entries[1:]) / 2)].view(codes.shape))


# -------------------------------------------------------------------------------------------------------------------- quantization


@fault("quantize_4bit", "quantize_blockwise", caught_by="test_quantize_4bit", among="ties")
def ties_to_the_upper_entry(right):
    def kernel(x, codebook, blocksize, *, out):
        right(-x, -codebook, blocksize, out=out)

    return kernel


@fault("quantize_4bit", caught_by="test_plain_call")
def first_element_in_the_low_nibble(right):
    def kernel(x, codebook, blocksize, *, out):
        right(x, codebook, blocksize, out=out)
        out[0].copy_(out[0] << 4 | out[0] >> 4)

    return kernel


@fault("quantize_blockwise", caught_by="test_quantize_blockwise_multiplies_by_the_reciprocal")
def division_in_the_tail_block(right):
    def kernel(x, codebook, blocksize, *, out):
        right(x, codebook, blocksize, out=out)
        start = x.numel() // blocksize * blocksize
        if start < x.numel():
            tail = (out[0].view(-1)[start:], out[1][-1:])
            _requantize(x.reshape(-1)[start:], codebook, blocksize, tail, lambda s, absmax: s / absmax.clamp(ABSMAX_FLOOR))

    return kernel


@fault("quantize_blockwise", caught_by="test_quantize_blockwise")
def codes_from_a_table_of_65536_bins(right):
    def kernel(x, codebook, blocksize, *, out):
        def scaled(rows, absmax):
            return torch.round(rows * (1 / absmax.clamp(ABSMAX_FLOOR)) * 32768) / 32768

        _requantize(x, codebook, blocksize, out, scaled)

    return kernel


@fault("quantize_4bit", caught_by="test_quantize_4bit", among="subnormal")
def subnormal_inputs_flushed(right):
    def kernel(x, codebook, blocksize, *, out):
        tiny = x.abs() < 2.0**-126
        right(torch.where(tiny, torch.zeros_like(x), x), codebook, blocksize, out=out)

    return kernel


@fault("quantize_4bit", caught_by="test_quantize_4bit")
def absmax_of_the_tail_without_its_last_element(right):
    def kernel(x, codebook, blocksize, *, out):
        right(x, codebook, blocksize, out=out)
        tail = x.reshape(-1)[(x.numel() - 1) // blocksize * blocksize :]
        if len(tail) < blocksize and len(tail) > 1:
            out[1][-1] = tail[:-1].abs().max()

    return kernel


@fault("quantize_4bit", caught_by="test_quantize_4bit")
def unused_nibble_is_zero(right):
    def kernel(x, codebook, blocksize, *, out):
        right(x, codebook, blocksize, out=out)
        if x.numel() % 2:
            out[0][-1] &= 0xF0

    return kernel


@fault("quantize_4bit", caught_by="test_quantize_4bit", among="nan")
def nan_spoils_only_itself(right):
    def kernel(x, codebook, blocksize, *, out):
        right(torch.where(x.isnan(), torch.zeros_like(x), x), codebook, blocksize, out=out)

    return kernel


# ------------------------------------------------------------------------------------------------------------------ dequantization


@fault("dequantize_4bit", caught_by="test_dequantize_4bit_nested")
def nested_scales_rounded_once(right):
    def kernel(packed, absmax, codebook, blocksize, nested, *, out):
        if nested is not None:
            groups = torch.arange(absmax.numel()) // nested.blocksize
            scales = nested.codebook[absmax.long()].double() * nested.absmax[groups] + nested.offset
            absmax, nested = scales.float(), None
        right(packed, absmax, codebook, blocksize, nested, out=out)

    return kernel


@fault("dequantize_4bit", caught_by="test_dequantize_4bit_nested")
def nested_blocksize_is_always_256(right):
    def kernel(packed, absmax, codebook, blocksize, nested, *, out):
        if nested is not None:
            nested = Nested(nested.absmax, nested.codebook, nested.offset, max(nested.blocksize, 256))
        right(packed, absmax, codebook, blocksize, nested, out=out)

    return kernel


@fault("dequantize_4bit", caught_by="test_dequantize_4bit")
def last_element_not_written(right):
    def kernel(packed, absmax, codebook, blocksize, nested, *, out):
        kept = out.view(-1)[-1:].clone()
        right(packed, absmax, codebook, blocksize, nested, out=out)
        if out.numel() % 2:
            out.view(-1)[-1:] = kept

    return kernel


@fault("dequantize_4bit", caught_by="test_dequantize_4bit")
def one_element_past_the_end(right):
    def kernel(packed, absmax, codebook, blocksize, nested, *, out):
        right(packed, absmax, codebook, blocksize, nested, out=out)
        if out.numel() % 2:  # the low nibble of the last byte
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)

    return kernel


@fault("dequantize_blockwise", caught_by="test_plain_call")
def input_modified(right):
    def kernel(codes, absmax, codebook, blocksize, *, out):
        right(codes, absmax, codebook, blocksize, out=out)
        absmax[-1] += 1

    return kernel


@fault("dequantize_blockwise", caught_by="test_same_bits_with_any_number_of_threads")
def share_of_the_second_thread_is_wrong(right):
    def kernel(codes, absmax, codebook, blocksize, *, out):
        right(codes, absmax, codebook, blocksize, out=out)
        if torch.get_num_threads() == 2:
            out.view(-1)[out.numel() // 2] += 1

    return kernel


@fault("dequantize_blockwise", caught_by="test_dequantize_blockwise")
def float16_intermediate(right):
    def kernel(codes, absmax, codebook, blocksize, *, out):
        value = torch.empty(out.shape, dtype=torch.float32)
        right(codes, absmax, codebook, blocksize, out=value)
        out.copy_(value.half() if out.dtype != torch.float32 else value)

    return kernel


@fault("embedding_4bit", caught_by="test_embedding_4bit")
def rows_start_at_whole_bytes(right):
    def kernel(indices, packed, absmax, codebook, blocksize, num_embeddings, embedding_dim, nested, *, out):
        right(indices, packed, absmax, codebook, blocksize, num_embeddings, embedding_dim, nested, out=out)
        if embedding_dim % 2:
            out[indices % 2 == 1] = out[indices % 2 == 1].roll(1, -1)

    return kernel


# ------------------------------------------------------------------------------------------------------------------------ products


@fault("gemm_4bit", caught_by="test_gemm_4bit")
def bias_forgotten_on_odd_rows(right):
    def kernel(x, packed, absmax, codebook, blocksize, N, K, bias, nested, *, out):
        right(x, packed, absmax, codebook, blocksize, N, K, None if K % 2 else bias, nested, out=out)

    return kernel


@fault("gemm_4bit", caught_by="test_each_weight")
def one_code_wrong(right):
    def kernel(x, packed, absmax, codebook, blocksize, N, K, bias, nested, *, out):
        packed = packed.clone()
        packed[packed.numel() // 2] ^= 0x10
        right(x, packed, absmax, codebook, blocksize, N, K, bias, nested, out=out)

    return kernel


@fault("gemm_4bit", caught_by="test_gemm_4bit")
def accumulates_in_the_dtype_of_x(right):
    def kernel(x, packed, absmax, codebook, blocksize, N, K, bias, nested, *, out):
        total = torch.zeros_like(out)
        part = torch.empty_like(out)
        for k in range(K):
            only = torch.zeros_like(x)
            only[..., k] = x[..., k]
            right(only, packed, absmax, codebook, blocksize, N, K, None, nested, out=part)
            total += part
        out.copy_(total if bias is None else total + bias)

    return kernel


@fault("gemm_4bit_transposed", caught_by="test_gemm_4bit_transposed")
def last_row_of_the_weight_skipped(right):
    def kernel(g, packed, absmax, codebook, blocksize, N, K, nested, *, out):
        g = g.clone()
        if N > 1:
            g[..., -1] = 0
        right(g, packed, absmax, codebook, blocksize, N, K, nested, out=out)

    return kernel


@fault("grouped_gemm_4bit", caught_by="test_grouped_gemm_4bit")
def nested_scales_start_again_at_each_expert(right):
    def kernel(x, packed, absmax, codebook, blocksize, offsets, N, K, nested, *, out):
        if nested is not None:
            blocks = absmax.shape[1]
            groups = torch.arange(blocks) // nested.blocksize
            absmax = nested.codebook[absmax.long()] * nested.absmax[groups] + nested.offset
        right(x, packed, absmax, codebook, blocksize, offsets, N, K, None, out=out)

    return kernel


# ----------------------------------------------------------------------------------------------------------------------- LLM.int8


@fault("int8_matmul", caught_by="test_int8_matmul_does_not_saturate_or_round")
def pairs_saturate_at_16_bits(right):
    def kernel(a, b, *, out):
        right(a, b, out=out)
        pair = torch.empty_like(out)
        right(a[:, :2].contiguous(), b[:, :2].contiguous(), out=pair)
        out -= pair - pair.clamp(max=2**15 - 1)

    return kernel


@fault("int8_matmul", caught_by="test_int8_matmul_does_not_saturate_or_round")
def sums_in_float32(right):
    def kernel(a, b, *, out):
        right(a, b, out=out)
        out.copy_(out.float().int())

    return kernel


@fault("int8_quantize_rows", caught_by="test_int8_quantize", among="halves")
def halves_away_from_zero(right):
    def kernel(x, threshold, *, out):
        right(x, threshold, out=out)
        codes, absmax, outlier_mask = out
        scaled = x.float() * (127 / absmax.clamp(2.0**-120))[:, None]
        rounded = torch.nan_to_num(scaled.sign() * (scaled.abs() + 0.5).floor())
        codes.copy_(rounded.clamp(-127, 127).masked_fill(outlier_mask, 0))

    return kernel


@fault("int8_quantize_rows", caught_by="test_int8_quantize", among="outliers")
def outliers_above_the_threshold_only(right):
    def kernel(x, threshold, *, out):
        above = torch.nextafter(torch.tensor(threshold), torch.tensor(float("inf"))).item() if threshold else 0.0
        right(x, above, out=out)

    return kernel


@fault("int8_linear", caught_by="test_int8_linear")
def outlier_columns_left_out(right):
    def kernel(x, codes, absmax, bias, threshold, *, out):
        if threshold:
            x = torch.where((x.abs() >= threshold).view(-1, x.shape[-1]).any(0), torch.zeros_like(x), x)
        right(x, codes, absmax, bias, threshold, out=out)

    return kernel


# ---------------------------------------------------------------------------------------------------------------------- optimizers


@fault("optimizer_step_32bit_", caught_by="test_optimizer_step")
def epsilon_inside_the_root(right):
    def kernel(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr):
        eps = hyperparameters.eps
        if algorithm != "adam" or hyperparameters.amsgrad:
            right(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr)
            return
        moved = [state + eps**2 / hyperparameters.beta2 for state in state2]
        right(params, grads, state1, moved, state3, algorithm, hyperparameters._replace(eps=0.0), step, lr)
        for state, other in zip(state2, moved):
            state.copy_(other - eps**2)

    return kernel


@fault("optimizer_step_32bit_", caught_by="test_optimizer_step", among="adam-decoupled")
def decay_after_the_update(right):
    def kernel(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr):
        h = hyperparameters
        late = h.decoupled_weight_decay and not h.skip_zeros
        right(params, grads, state1, state2, state3, algorithm, h._replace(weight_decay=0.0) if late else h, step, lr)
        for param in params:
            if late:
                param.copy_(param.float() * (1 - lr * h.weight_decay))

    return kernel


@fault("optimizer_step_32bit_", caught_by="test_optimizer_step", among="adam-decoupled")
def parameter_rounded_twice(right):
    def kernel(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr):
        h = hyperparameters
        if h.decoupled_weight_decay and not h.skip_zeros and params[0].dtype != torch.float32:
            for param in params:
                param *= 1 - lr * h.weight_decay
            h = h._replace(weight_decay=0.0)
        right(params, grads, state1, state2, state3, algorithm, h, step, lr)

    return kernel


@fault("optimizer_step_32bit_", caught_by="test_optimizer_step", among="skip-zeros")
def zero_gradients_not_skipped(right):
    def kernel(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr):
        right(params, grads, state1, state2, state3, algorithm, hyperparameters._replace(skip_zeros=False), step, lr)

    return kernel


@fault("optimizer_step_32bit_", caught_by="test_non_finite_gradients_change_nothing")
def infinite_gradients_taken(right):
    def kernel(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr):
        grads = [grad.clamp(-1e4, 1e4) for grad in grads]
        right(params, grads, state1, state2, state3, algorithm, hyperparameters, step, lr)

    return kernel


@fault("optimizer_step_8bit_blockwise_", caught_by="test_optimizer_step", among="sgd-momentum")
def update_from_the_rounded_state(right):
    def kernel(params, grads, state1, *rest):
        (absmax1, _, _, codebook, _, _, algorithm, h, _, lr, blocksize) = rest[2:]
        before = [param.float() for param in params]
        right(params, grads, state1, *rest)
        if algorithm == "sgd" and state1 and not h.nesterov and not h.max_unorm:
            for param, old, codes, absmax in zip(params, before, state1, absmax1):
                scale = absmax.repeat_interleave(blocksize)[: codes.numel()].view(codes.shape)
                param.copy_(old - lr * codebook[codes.long()] * scale)

    return kernel


@fault("optimizer_step_8bit_blockwise_", caught_by="test_optimizer_step")
def last_code_of_a_state_one_off(right):
    def kernel(params, grads, state1, *rest):
        right(params, grads, state1, *rest)
        for codes in state1:
            last = codes.view(-1)[-1:]
            last.copy_(torch.where(last > 127, last - 1, last + 1))

    return kernel


@fault("optimizer_step_8bit_blockwise_", caught_by="test_parameters_of_any_strides")
def blocks_in_logical_order(right):
    """Right for rows in order only: elsewhere each state is cut into blocks across the order in memory."""

    def kernel(params, grads, *rest):
        right(params, grads, *rest)
        for param, codes in zip(params, rest[0]):
            if not param.is_contiguous():
                codes.copy_(codes.contiguous().view(-1).roll(1).view(codes.shape))

    return kernel
