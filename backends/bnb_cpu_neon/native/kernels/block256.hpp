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

/// Fills the n entries of codes, without their scale. They go from table to memory through no vector register, which takes fewest
/// instructions where the scale can be applied later.
inline void copy_entries(const uint8_t *codes, const float *codebook, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        for (int64_t first = i; first < i + 32; first += 8) {
            uint32_t entries[8];
            for (int j = 0; j < 8; ++j) std::memcpy(entries + j, codebook + codes[first + j], sizeof(float));
            std::memcpy(out + first, entries, sizeof entries);
        }
    }
    for (; i < n; ++i) out[i] = codebook[codes[i]];
}

/// Four entries of the table. Loading them one by one beats table instructions, of which 16 codes would take 16 of the slowest.
inline float32x4_t look_up(const float *codebook, const uint8_t *codes) {
    float32x4_t values = vdupq_n_f32(codebook[codes[0]]);
    values = vsetq_lane_f32(codebook[codes[1]], values, 1);
    values = vsetq_lane_f32(codebook[codes[2]], values, 2);
    return vsetq_lane_f32(codebook[codes[3]], values, 3);
}

/// Fills the n values of a block, or of a part of it.
template <class T>
inline void dequantize_block(const uint8_t *codes, const float *codebook, float absmax, int64_t n, T *out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j += 4) store4(out + i + j, vmulq_n_f32(look_up(codebook, codes + i + j), absmax));
    for (; i < n; ++i) store1(out + i, codebook[codes[i]] * absmax);
}

}  // namespace bnb
