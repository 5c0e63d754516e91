/// Blocks of 8-bit codes, one scale each.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/blocks.hpp"
#include "kernels/codebook256.hpp"

namespace bnb {

/// Fills the codes of n values of a block that has this absmax.
template <class T>
inline void encode_block(const Codebook256 &codebook, const T *x, int64_t n, float absmax, uint8_t *codes) {
    if (std::isfinite(absmax)) {
        codebook.encode(x, n, block_scale(absmax), codes);
    } else {  // scaled values are 0 or NaN
        std::memset(codes, codebook.code_of_zero(), static_cast<std::size_t>(n));
    }
}

/// Fills the codes of a block of n values, and returns its absmax.
template <class T>
inline float quantize_block(const Codebook256 &codebook, const T *x, int64_t n, uint8_t *codes) {
    const float absmax = largest_magnitude(x, n);
    encode_block(codebook, x, n, absmax, codes);
    return absmax;
}

/// Elements whose entries are copied at a time.
constexpr int64_t copy_step = 32;

/// Fills the entries of eight codes. They go from table to memory through no vector register, which takes fewest instructions.
BNB_INLINE inline void copy_8_entries(const uint8_t *codes, const float *codebook, float *out) {
    uint32_t entries[8];
    for (int j = 0; j < 8; ++j) std::memcpy(entries + j, codebook + codes[j], sizeof(float));
    std::memcpy(out, entries, sizeof entries);
}

/// Fills the entries of `copy_step` codes.
BNB_INLINE inline void copy_entries(const uint8_t *codes, const float *codebook, float *out) {
    unroll<copy_step / 8>([&](auto group) BNB_INLINE { copy_8_entries(codes + 8 * group, codebook, out + 8 * group); });
}

/// Fills the n entries of codes, without their scale.
inline void copy_entries(const uint8_t *codes, const float *codebook, int64_t n, float *out) {
    for (; n >= copy_step; n -= copy_step, codes += copy_step, out += copy_step) copy_entries(codes, codebook, out);
    for (int64_t i = 0; i < n; ++i) out[i] = codebook[codes[i]];
}

}  // namespace bnb
