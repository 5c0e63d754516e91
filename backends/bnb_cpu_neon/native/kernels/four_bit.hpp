/// Entry points of the 4-bit ops. What each computes is defined in bnb_core.ops.spec; tensors are contiguous.
#pragma once

#include <cstdint>

#include "elements.hpp"
#include "kernels/packed.hpp"

namespace bnb {

/// Fills `packed` [ceil(n / 2)] and `absmax` [ceil(n / blocksize)]; the blocksize is even.
void quantize_4bit(
    DType dtype, const void *x, int64_t n, const float *codebook, int64_t blocksize, uint8_t *packed, float *absmax, int threads);

/// Fills `out` with the n values of a tensor.
void dequantize_4bit(const Packed4bit &tensor, int64_t n, DType dtype, void *out, int threads);

}  // namespace bnb
