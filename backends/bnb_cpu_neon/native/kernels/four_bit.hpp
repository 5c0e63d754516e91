/// Entry points of the 4-bit ops. What each computes is defined in bnb_core.ops.spec; tensors are contiguous.
#pragma once

#include <cstdint>

#include "elements.hpp"
#include "kernels/packed.hpp"

namespace bnb {

/// Fills `out` with the n values of a tensor.
void dequantize_4bit(const Packed4bit &tensor, int64_t n, DType dtype, void *out, int threads);

}  // namespace bnb
