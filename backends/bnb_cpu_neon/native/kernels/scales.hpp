/// The scales of blocks, as they are stored: float32, or 8-bit codes of a second quantization.
#pragma once

#include <cstdint>

namespace bnb {

/// Quantized block scales; see bnb_core.ops.spec.Nested. All null where scales are float32.
struct Nested {
    const float *absmax = nullptr;    ///< [ceil(blocks / blocksize)]
    const float *codebook = nullptr;  ///< [256]
    const float *offset = nullptr;    ///< [1]
    int64_t blocksize = 0;
};

struct BlockScales {
    const void *absmax;  ///< float [blocks], or uint8_t [blocks] with `nested`
    int64_t blocksize;   ///< elements that share a scale
    Nested nested;
    int64_t first = 0;  ///< number of the block that is block 0 here

    /// The same scales, counted from another block on.
    BlockScales from(int64_t block) const {
        if (!nested.absmax) return {static_cast<const float *>(absmax) + block, blocksize, nested, 0};
        return {static_cast<const uint8_t *>(absmax) + block, blocksize, nested, first + block};
    }

    /// The scale of a block. A nested one is recovered with a rounding after each of two operations.
    float operator[](int64_t block) const {
        if (!nested.absmax) return static_cast<const float *>(absmax)[block];
        const float code_value = nested.codebook[static_cast<const uint8_t *>(absmax)[block]];
        const float product = code_value * nested.absmax[(first + block) / nested.blocksize];
        return product + *nested.offset;
    }
};

}  // namespace bnb
