/// Entry points of the 8-bit blockwise ops. What each computes is defined in bnb_core.ops.spec; tensors are contiguous.
#pragma once

#include <cstdint>

#include "elements.hpp"

namespace bnb {

/// Fills `codes` [n] and `absmax` [ceil(n / blocksize)].
void quantize_blockwise(
    DType dtype, const void *x, int64_t n, const float *codebook, int64_t blocksize, uint8_t *codes, float *absmax, int threads);

/// Fills `out` with the n values of `codes`.
void dequantize_blockwise(
    const uint8_t *codes, const float *absmax, const float *codebook, int64_t blocksize, int64_t n, DType dtype, void *out, int threads);

}  // namespace bnb
