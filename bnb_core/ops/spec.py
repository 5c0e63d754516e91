"""Every op of the backend API: its parameters, outputs and contract, in one frozen place.

Torch schemas, the check of a kernel's signature, the conformance suite and the op reference are derived from the table `OPS`
at the end of this file. Nothing else states an op's signature. The module needs neither torch nor a backend.

Notation. `T` is float32, float16 or bfloat16, one for the whole call. `n` is the number of elements of the quantized tensor
and `blocks` is ceil(n / blocksize). Packed 4-bit codes hold the first element of each pair in the high nibble.

What an op computes
-------------------
*Quantize* (`quantize_blockwise`, `quantize_4bit`; to the bit). Blocks are `blocksize` consecutive elements of the row-major
tensor; the last may be shorter and follows the same rule. In float32: absmax = max |x| of the block;
scale = 1 / max(absmax, 2^-126); s = x * scale; the code is that of the entry whose rank is the number of midpoints strictly
below s. Entries are ranked by value, then by code; the midpoint of two neighbours is (a + b) * 0.5 in float32. A NaN in a block
makes its absmax NaN; any s that is NaN takes the code of s = 0. The unused low nibble of an odd `n` holds the code of s = 0.

*Dequantize* (to the bit). codebook[code] * absmax: one float32 multiplication, then round to nearest even into the output dtype.
With `nested` statistics, absmax[i] is first recovered as
nested_codebook[absmax[i]] * nested_absmax[i // nested_blocksize] + nested_offset, rounding after each of the two operations.

*Products* (per-element bound). With W the dequantized weight in float32 terms, y = x W^T + bias, and against float64:
|error| <= u_out |y| + (u_op + 2^-24 K) sum |x| |w|, where u = 2^-24, 2^-11, 2^-8 for float32, float16, bfloat16.

*LLM.int8* (arXiv 2208.07339). A row's or column's absmax is taken over the elements with |x| < threshold (over all of them if
threshold == 0); a column is an outlier column if any |x| in it reaches the threshold. code = round_half_even(x * (127 / max(absmax,
2^-120))) in float32, 0 wherever that is NaN; row codes are 0 in outlier columns. Integer products are exact in int32.
`int8_linear` adds the outlier columns, x against the dequantized int8 weight, to the scaled integer product.

*Optimizers* (see `Hyperparameters` and `ALGORITHMS`). All arithmetic is float32 on the unrounded state.

Who may change this file: a minor version may append a parameter with a default and `since=(1, minor)`, or add an op. Everything
else is a new major version.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Mapping, NamedTuple, Optional, Tuple

API_VERSION: Tuple[int, int] = (1, 0)

#: Smallest absmax that quantization divides by: the smallest normal float32.
ABSMAX_FLOOR = 2.0**-126
#: The same for int8 rows, where 127 / absmax must stay finite.
INT8_ABSMAX_FLOOR = 2.0**-120
#: Largest magnitude of an int8 code (-128 is never produced).
INT8_MAX = 127
#: Blocksizes of 4-bit tensors. The 8-bit blockwise ops take any positive blocksize.
BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Blocksize of 8-bit optimizer states (bitsandbytes' since 0.44).
OPTIMIZER_BLOCKSIZE = 256

#: The floating-point dtypes that `T` stands for.
FLOATS = ("float32", "float16", "bfloat16")


class Nested(NamedTuple):
    """Quantized block scales ("double quantization"; QLoRA, arXiv 2305.14314): absmax holds uint8 codes of these."""

    absmax: Any
    """float32 [ceil(blocks / blocksize)]: scales of the scales."""
    codebook: Any
    """float32 [256]."""
    offset: Any
    """float32 []: added after the scales are dequantized; on the device."""
    blocksize: int
    """Scales that share one nested scale; 256 in bitsandbytes' checkpoints."""


class Hyperparameters(NamedTuple):
    """What an optimizer step needs besides tensors, `step` and `lr`. Fields an algorithm does not name are ignored by it.

    For each element, with t = step (1 at the first step), in float32:

    1. An element whose gradient is not finite, or is zero while `skip_zeros`, keeps its parameter and state values.
    2. g = gnorm_scale * grad. Weight decay: if `decoupled_weight_decay`, p *= 1 - lr * weight_decay, before the update (the
       adagrad rate below does not enter here); otherwise g += weight_decay * p.
    3. The algorithm (see `ALGORITHMS`) updates its states from g and gives a direction u.
    4. If max_unorm > 0: with |p| the L2 norm of the whole parameter tensor before step 2, and |u| that of the direction, u is
       scaled by max_unorm |p| / |u| where |p| > 0 and |u| > max_unorm |p|. Elements left alone by 1. have u = 0.
    5. p -= lr * u, rounded once into p's dtype.
    """

    beta1: float = 0.0
    beta2: float = 0.0
    beta3: float = 0.0
    alpha: float = 0.0
    t_alpha: int = 0
    """AdEMAMix: steps over which alpha grows linearly; 0 means it is constant."""
    t_beta3: int = 0
    """AdEMAMix: steps over which beta3 grows from beta1; 0 means it is constant."""
    eps: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    gnorm_scale: float = 1.0
    max_unorm: float = 0.0
    skip_zeros: bool = False
    nesterov: bool = False
    centered: bool = False
    amsgrad: bool = False
    bias_correction: bool = True


#: Update rules: name -> (state1, state2, state3, rule). A state list is empty where its name is None or its condition is false.
#: AdamW is `adam` with decoupled weight decay; LAMB is `adam`, and LARS is `sgd`, with max_unorm > 0.
ALGORITHMS: Mapping[str, Tuple[Optional[str], Optional[str], Optional[str], str]] = MappingProxyType(
    {
        "adam": (
            "exp_avg",
            "exp_avg_sq",
            "max_exp_avg_sq (amsgrad)",
            "m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; with amsgrad w = max(w, v), otherwise w = v; "
            "u = (m / c1) / (sqrt(w) / c2 + eps), c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t), or both 1 without bias_correction",
        ),
        "ademamix": (
            "exp_avg",
            "exp_avg_sq",
            "exp_avg_slow",
            "m = beta1 m + (1 - beta1) g; n = beta3_t n + (1 - beta3_t) g; v = beta2 v + (1 - beta2) g^2; "
            "u = (m / c1 + alpha_t n) / (sqrt(v) / c2 + eps); alpha_t = min(t alpha / t_alpha, alpha); "
            "beta3_t = min(exp(ln beta1 ln beta3 / ((1 - t/t_beta3) ln beta3 + (t/t_beta3) ln beta1)), beta3) (arXiv 2409.03137)",
        ),
        "lion": ("exp_avg", None, None, "u = sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g (arXiv 2302.06675)"),
        "sgd": (
            "momentum_buffer (momentum)",
            None,
            None,
            "without momentum u = g; otherwise b = g at t = 1 and momentum b + (1 - dampening) g later; "
            "u = g + momentum b with nesterov, else u = b",
        ),
        "rmsprop": (
            "square_avg",
            "momentum_buffer (momentum)",
            "grad_avg (centered)",
            "v = beta2 v + (1 - beta2) g^2; if centered a = beta2 a + (1 - beta2) g and d = max(v - a^2, 0), otherwise d = v; "
            "q = g / (sqrt(d) + eps); with momentum b = momentum b + q and u = b, otherwise u = q",
        ),
        "adagrad": (
            "sum",
            None,
            None,
            "h = h + g^2; u = g / ((sqrt(h) + eps) (1 + (t - 1) lr_decay))",
        ),
    }
)


@dataclass(frozen=True)
class Parameter:
    """One argument of an op, as a caller of the op and (where `to_kernel`) a kernel see it."""

    name: str
    kind: str
    """tensor, tensors (a list), int, ints, float, str, dtype, nested, hyperparameters, or number (also a 0-d tensor)."""
    layout: str = ""
    """dtype and shape, in the notation of this module."""
    optional: bool = False
    """The argument may be None."""
    mutated: bool = False
    to_kernel: bool = True
    """False for what the output tensors already say (`shape`, `dtype`): kernels read it off `out`."""
    since: Tuple[int, int] = (1, 0)
    default: Any = None
    """Value that stands in where a kernel of an older minor version does not know the parameter."""


@dataclass(frozen=True)
class OpSpec:
    """The signature and the contract of one op."""

    name: str
    summary: str
    parameters: Tuple[Parameter, ...]
    outputs: Tuple[Tuple[str, str], ...]
    """(name, dtype and shape) of each output tensor; empty for an op that only works in place."""
    dispatch: str
    """Parameter whose device, and whose dtype unless `dispatch_dtype` is given, select the kernel."""
    dispatch_dtype: Optional[str] = None
    """Parameter that holds the dtype to select by, where it is not that of `dispatch`."""
    dtypes: Tuple[str, ...] = FLOATS
    """Every dtype that kernels are selected by."""
    contract: str = "exact"
    """exact (to the bit), product (the per-element bound) or optimizer."""
    since: Tuple[int, int] = (1, 0)

    def kernel_parameters(self, api_version: Tuple[int, int] = API_VERSION) -> Tuple[str, ...]:
        """Name, in order, the positional parameters of a kernel written for `api_version`."""
        return tuple(p.name for p in self.parameters if p.to_kernel and p.since <= api_version)


def _tensor(name: str, layout: str, optional: bool = False) -> Parameter:
    return Parameter(name, "tensor", layout, optional=optional)


def _tensors(name: str, layout: str, mutated: bool = True) -> Parameter:
    return Parameter(name, "tensors", layout, mutated=mutated)


def _int(name: str, layout: str = "") -> Parameter:
    return Parameter(name, "int", layout)


_X = _tensor("x", "T[..., K]")
_BIAS = _tensor("bias", "T[N]", optional=True)
_BLOCKSIZE = _int("blocksize")
_NK = (_int("N", "rows of the weight"), _int("K", "columns of the weight"))
_NESTED = Parameter("nested", "nested", "four arguments, all given or none; absmax is then u8", optional=True)
_DTYPE = Parameter("dtype", "dtype", "T", to_kernel=False)
_PACKED_WEIGHT = (
    _tensor("packed", "u8[(N*K+1)//2]"),
    _tensor("absmax", "f32[blocks] or u8[blocks]"),
    _tensor("codebook", "f32[16]"),
    _BLOCKSIZE,
)
_PACKED_EXPERTS = (
    _tensor("packed", "u8[E, (N*K+1)//2]"),
    _tensor("absmax", "f32[E, blocks] or u8[E, blocks]; nested scales run over all experts' blocks in order"),
    _tensor("codebook", "f32[16]"),
    _BLOCKSIZE,
    _tensor("offsets", "i32[E+1]: tokens offsets[e] to offsets[e+1] belong to expert e; from 0 to tokens, never falling"),
)
_INT8_WEIGHT = (_tensor("codes", "i8[N, K]"), _tensor("absmax", "f32[N]"))
_THRESHOLD = Parameter("threshold", "float", "0.0 for no outliers")
_STEP_INPUTS = (
    _tensors("params", "T[...] each"),
    _tensors("grads", "T[...] each, the parameter's shape and strides", mutated=False),
)
_STEP_SCALARS = (
    Parameter("algorithm", "str", "a key of ALGORITHMS"),
    Parameter("hyperparameters", "hyperparameters"),
    Parameter("step", "number", "int, or f32[] on the device; 1 at the first step"),
    Parameter("lr", "number", "float, or f32[] on the device"),
)

_TABLE = (
    OpSpec(
        "quantize_blockwise",
        "Quantize to 8-bit codes with one scale a block.",
        (_tensor("x", "T[...]"), _tensor("codebook", "f32[256]"), _BLOCKSIZE),
        (("codes", "u8[...]"), ("absmax", "f32[blocks]")),
        dispatch="x",
    ),
    OpSpec(
        "dequantize_blockwise",
        "Dequantize 8-bit codes with one scale a block.",
        (_tensor("codes", "u8[...]"), _tensor("absmax", "f32[blocks]"), _tensor("codebook", "f32[256]"), _BLOCKSIZE, _DTYPE),
        (("x", "T[...]"),),
        dispatch="codes",
        dispatch_dtype="dtype",
    ),
    OpSpec(
        "quantize_4bit",
        "Quantize to packed 4-bit codes with one scale a block.",
        (_tensor("x", "T[...]"), _tensor("codebook", "f32[16]"), _BLOCKSIZE),
        (("packed", "u8[(n+1)//2]"), ("absmax", "f32[blocks]")),
        dispatch="x",
    ),
    OpSpec(
        "dequantize_4bit",
        "Dequantize packed 4-bit codes.",
        (
            _tensor("packed", "u8[(n+1)//2]"),
            _tensor("absmax", "f32[blocks] or u8[blocks]"),
            _tensor("codebook", "f32[16]"),
            _BLOCKSIZE,
            Parameter("shape", "ints", to_kernel=False),
            _DTYPE,
            _NESTED,
        ),
        (("x", "T[shape]"),),
        dispatch="packed",
        dispatch_dtype="dtype",
    ),
    OpSpec(
        "gemm_4bit",
        "Multiply by a 4-bit weight: x W^T + bias. Any number of rows of x, K odd, blocks that straddle rows of W.",
        (_X, *_PACKED_WEIGHT, *_NK, _BIAS, _NESTED),
        (("y", "T[..., N]"),),
        dispatch="x",
        contract="product",
    ),
    OpSpec(
        "gemm_4bit_transposed",
        "Multiply by a 4-bit weight, transposed: g W, the backward of gemm_4bit.",
        (_tensor("g", "T[..., N]"), *_PACKED_WEIGHT, *_NK, _NESTED),
        (("grad_x", "T[..., K]"),),
        dispatch="g",
        contract="product",
    ),
    OpSpec(
        "grouped_gemm_4bit",
        "Multiply each token by its expert's 4-bit weight; tokens are sorted by expert.",
        (_tensor("x", "T[tokens, K]"), *_PACKED_EXPERTS, *_NK, _NESTED),
        (("y", "T[tokens, N]"),),
        dispatch="x",
        contract="product",
    ),
    OpSpec(
        "grouped_gemm_4bit_transposed",
        "The same with transposed weights, the backward of grouped_gemm_4bit.",
        (_tensor("g", "T[tokens, N]"), *_PACKED_EXPERTS, *_NK, _NESTED),
        (("grad_x", "T[tokens, K]"),),
        dispatch="g",
        contract="product",
    ),
    OpSpec(
        "embedding_4bit",
        "Dequantize only the rows of a 4-bit table that `indices` name.",
        (
            _tensor("indices", "i32[...] or i64[...], each in [0, num_embeddings)"),
            _tensor("packed", "u8[(num_embeddings*embedding_dim+1)//2]"),
            _tensor("absmax", "f32[blocks] or u8[blocks]"),
            _tensor("codebook", "f32[16]"),
            _BLOCKSIZE,
            _int("num_embeddings"),
            _int("embedding_dim"),
            _DTYPE,
            _NESTED,
        ),
        (("x", "T[..., embedding_dim]"),),
        dispatch="packed",
        dispatch_dtype="dtype",
    ),
    OpSpec(
        "embedding_8bit",
        "Dequantize only the rows of an int8 table that `indices` name: codes * (absmax * (1/127)), rounding after each.",
        (
            _tensor("indices", "i32[...] or i64[...], each in [0, num_embeddings)"),
            _tensor("codes", "i8[num_embeddings, embedding_dim]"),
            _tensor("absmax", "f32[num_embeddings]"),
            _DTYPE,
        ),
        (("x", "T[..., embedding_dim]"),),
        dispatch="codes",
        dispatch_dtype="dtype",
    ),
    OpSpec(
        "int8_quantize_rows",
        "Quantize rows to int8, leaving out outlier columns.",
        (_tensor("x", "T[M, K]"), _THRESHOLD),
        (("codes", "i8[M, K]"), ("absmax", "f32[M]"), ("outlier_mask", "bool[K]")),
        dispatch="x",
    ),
    OpSpec(
        "int8_quantize_rows_cols",
        "Quantize to int8 by rows as int8_quantize_rows does, and by columns, where elements that reach the threshold become 0.",
        (_tensor("x", "T[M, K]"), _THRESHOLD),
        (
            ("row_codes", "i8[M, K]"),
            ("row_absmax", "f32[M]"),
            ("col_codes", "i8[M, K]"),
            ("col_absmax", "f32[K]"),
            ("outlier_mask", "bool[K]"),
        ),
        dispatch="x",
    ),
    OpSpec(
        "int8_matmul",
        "Multiply int8 matrices exactly: a b^T.",
        (_tensor("a", "i8[M, K]"), _tensor("b", "i8[N, K]")),
        (("product", "i32[M, N]"),),
        dispatch="a",
        dtypes=("int8",),
    ),
    OpSpec(
        "int8_matmul_dequant",
        "Scale an int32 product by row and column absmax, over 127^2, and add the bias.",
        (
            _tensor("product", "i32[M, N]"),
            _tensor("row_absmax", "f32[M]"),
            _tensor("col_absmax", "f32[N]"),
            _BIAS,
            _DTYPE,
        ),
        (("y", "T[M, N]"),),
        dispatch="product",
        dispatch_dtype="dtype",
        contract="product",
    ),
    OpSpec(
        "int8_dequantize_rows",
        "Dequantize int8 rows: codes * (absmax * (1/127)), rounding after each.",
        (_tensor("codes", "i8[M, K]"), _tensor("absmax", "f32[M]"), _DTYPE),
        (("x", "T[M, K]"),),
        dispatch="codes",
        dispatch_dtype="dtype",
    ),
    OpSpec(
        "int8_linear",
        "LLM.int8 in one call: quantize x, multiply, add outlier columns, scale, add the bias. Does not synchronize.",
        (_X, *_INT8_WEIGHT, _BIAS, _THRESHOLD),
        (("y", "T[..., N]"),),
        dispatch="x",
        contract="product",
    ),
    OpSpec(
        "int8_linear_transposed",
        "Multiply by a dequantized int8 weight: g W, the backward of int8_linear.",
        (_tensor("g", "T[..., N]"), *_INT8_WEIGHT),
        (("grad_x", "T[..., K]"),),
        dispatch="g",
        contract="product",
    ),
    OpSpec(
        "optimizer_step_32bit_",
        "Update parameters in place, float32 states.",
        (
            *_STEP_INPUTS,
            _tensors("state1", "f32[...] each"),
            _tensors("state2", "f32[...] each"),
            _tensors("state3", "f32[...] each"),
            *_STEP_SCALARS,
        ),
        (),
        dispatch="params",
        contract="optimizer",
    ),
    OpSpec(
        "optimizer_step_8bit_blockwise_",
        "Update parameters in place, blockwise 8-bit states.",
        (
            *_STEP_INPUTS,
            _tensors("state1", "u8[...] each"),
            _tensors("state2", "u8[...] each"),
            _tensors("state3", "u8[...] each"),
            _tensors("absmax1", "f32[blocks] each"),
            _tensors("absmax2", "f32[blocks] each"),
            _tensors("absmax3", "f32[blocks] each"),
            _tensor("codebook1", "f32[256]", optional=True),
            _tensor("codebook2", "f32[256]", optional=True),
            _tensor("codebook3", "f32[256]", optional=True),
            *_STEP_SCALARS,
            _BLOCKSIZE,
        ),
        (),
        dispatch="params",
        contract="optimizer",
    ),
)

#: Every op, by name, in the order of the op reference.
OPS: Mapping[str, OpSpec] = MappingProxyType({spec.name: spec for spec in _TABLE})
