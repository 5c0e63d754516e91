/// Entry points of products with 4-bit weights. What each computes is defined in bnb_core.ops.spec; tensors are contiguous.
///
/// Everything is computed in float32 from float32 weights, whatever the dtype, and rounded once, unless its name says `fast`. The
/// results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "elements.hpp"
#include "kernels/packed.hpp"

namespace bnb {

/// Floats of scratch memory that `gemm_4bit` needs for M rows of x.
int64_t gemm_4bit_scratch(int64_t M, int64_t K);

/// Fills y [M, N] with x [M, K] times the transposed weight [N, K], plus `bias` [N] unless that is null.
using Gemm4bit = void(
    DType dtype, const void *x, int64_t M, const Packed4bit &weight, int64_t N, int64_t K, const void *bias, void *y, float *scratch,
    int threads);

Gemm4bit gemm_4bit;

/// The same, but faster, with x and the weight rounded to int8: each element of x to a multiple of 1/127 of the largest magnitude in
/// its block, which is as long as the weight's and begins where these do; each weight to one of its block's. Sums within a block
/// are exact, those of blocks in float32. A block of x that is not all finite makes its row NaN. K must be a multiple of the blocksize.
/// Where that is no faster, as for 7 rows and more in the baseline tier, does what `gemm_4bit` does.
Gemm4bit fast_gemm_4bit;

/// Floats of scratch memory that `gemm_4bit_transposed` needs for M rows of g.
int64_t gemm_4bit_transposed_scratch(int64_t M, int64_t N);

/// Fills y [M, K] with g [M, N] times the weight [N, K].
void gemm_4bit_transposed(
    DType dtype, const void *g, int64_t M, const Packed4bit &weight, int64_t N, int64_t K, void *y, float *scratch, int threads);

/// Which rows belong to each expert, and the experts' weights.
struct Experts {
    const int32_t *offsets;  ///< [count + 1]
    int64_t count;
    Packed4bit weights;  ///< each [N, K], one after the other; no byte and no block belongs to two
};

/// Floats of scratch memory that `grouped_gemm_4bit` needs.
int64_t grouped_gemm_4bit_scratch(int64_t tokens, int64_t K);

/// Fills y [tokens, N] with each row of x [tokens, K] times the transposed weight of its expert, by `gemm_4bit` or `fast_gemm_4bit`.
void grouped_gemm_4bit(
    Gemm4bit *multiply, DType dtype, const void *x, const Experts &experts, int64_t N, int64_t K, void *y, float *scratch, int threads);

/// Fills y [tokens, K] with each row of g [tokens, N] times the weight of its expert. Needs the scratch memory of
/// `gemm_4bit_transposed` for all tokens.
void grouped_gemm_4bit_transposed(
    DType dtype, const void *g, const Experts &experts, int64_t N, int64_t K, void *y, float *scratch, int threads);

}  // namespace bnb
