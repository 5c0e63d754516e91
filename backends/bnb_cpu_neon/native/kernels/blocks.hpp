/// The scale of a block that is to be quantized.
#pragma once

#include <cmath>
#include <cstdint>

#include "elements.hpp"

namespace bnb {

/// Smallest absmax that quantization divides by: the smallest normal float32.
constexpr float absmax_floor = 0x1p-126f;

/// What scaled values are multiplied by.
inline float block_scale(float absmax) { return 1.0f / (absmax > absmax_floor ? absmax : absmax_floor); }

/// The largest magnitude of n values; a NaN if there is one.
template <class T>
inline float largest_magnitude(const T *x, int64_t n) {
    // Magnitudes compare as their bits do, and NaN is above all.
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t most[2] = {vdupq_n_u32(0), vdupq_n_u32(0)};
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        for (int j = 0; j < 8; ++j) {
            most[j % 2] = vmaxq_u32(most[j % 2], vandq_u32(vreinterpretq_u32_f32(load4(x + i + 4 * j)), magnitude));
        }
    }
    for (; i < n; ++i) most[0] = vmaxq_u32(most[0], vandq_u32(vreinterpretq_u32_f32(vdupq_n_f32(load1(x + i))), magnitude));
    const uint32_t bits = vmaxvq_u32(vmaxq_u32(most[0], most[1]));
    return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(bits)), 0);
}

/// The same in 16 bits, eight at a time: magnitudes compare as their bits do in these formats too.
template <class T>
inline float largest_magnitude_16bit(const T *x, int64_t n) {
    const uint16x8_t magnitude = vdupq_n_u16(0x7fff);
    uint16x8_t most[2] = {vdupq_n_u16(0), vdupq_n_u16(0)};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 2; ++j) most[j] = vmaxq_u16(most[j], vandq_u16(vld1q_u16(&x[i + 8 * j].bits), magnitude));
    }
    for (; i < n; ++i) most[0] = vmaxq_u16(most[0], vandq_u16(vdupq_n_u16(x[i].bits), magnitude));
    const T largest{vmaxvq_u16(vmaxq_u16(most[0], most[1]))};
    return load1(&largest);
}

inline float largest_magnitude(const Half *x, int64_t n) { return largest_magnitude_16bit(x, n); }
inline float largest_magnitude(const BFloat16 *x, int64_t n) { return largest_magnitude_16bit(x, n); }

}  // namespace bnb
