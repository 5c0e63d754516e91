/// Entry points of the embedding ops. What each computes is defined in bnb_core.ops.spec; tensors are contiguous.
#pragma once

#include <cstdint>

#include "elements.hpp"
#include "kernels/packed.hpp"

namespace bnb {

/// The rows of a table that are asked for, as int32 or int64.
struct Indices {
    const void *values;
    bool wide;  ///< int64
    int64_t count;

    int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t *>(values)[i] : static_cast<const int32_t *>(values)[i];
    }
};

/// Fills `out` [indices, width] with rows of a 4-bit table.
void embedding_4bit(const Indices &indices, const Packed4bit &table, int64_t width, DType dtype, void *out, int threads);

/// Fills `out` [indices, width] with rows of an int8 table; each row has one scale.
void embedding_8bit(
    const Indices &indices, const int8_t *codes, const float *absmax, int64_t width, DType dtype, void *out, int threads);

}  // namespace bnb
