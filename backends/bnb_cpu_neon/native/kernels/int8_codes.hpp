/// int8 codes of rows: absmax and rounding.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elements.hpp"
#include "kernels/blocks.hpp"

namespace bnb {

/// An absmax that 127 can be divided by. A NaN stays one.
inline float int8_floored(float absmax) { return absmax < 0x1p-120f ? 0x1p-120f : absmax; }

/// What values are multiplied by to become codes.
inline float int8_scale(float absmax) { return 127.0f / int8_floored(absmax); }

/// The bits of the magnitudes. As integers they are in the order of the numbers, and NaN is above all: so a maximum finds it.
inline uint32x4_t magnitude_bits(float32x4_t values) { return vreinterpretq_u32_f32(vabsq_f32(values)); }

/// Which elements are below the threshold, and which reach it. There is no threshold if it is 0; NaN is neither.
class OutlierTest {
  public:
    explicit OutlierTest(double threshold) : any_(threshold > 0), threshold_(static_cast<float>(threshold)) {}

    bool any() const { return any_; }
    /// The magnitudes' bits where they are below the threshold, or everywhere if there is none; else 0.
    uint32x4_t regular(float32x4_t values) const {
        const uint32x4_t bits = magnitude_bits(values);
        return any_ ? vandq_u32(bits, vcltq_f32(vabsq_f32(values), vdupq_n_f32(threshold_))) : bits;
    }
    uint32x4_t reached(float32x4_t values) const {
        return any_ ? vcgeq_f32(vabsq_f32(values), vdupq_n_f32(threshold_)) : vdupq_n_u32(0);
    }

  private:
    bool any_;
    float threshold_;
};

constexpr int64_t int8_step = 16;

/// The codes of 16 values, NaN's being 0.
template <class T>
inline int8x16_t int8_codes(const T *x, float scale) {
    const int32x4_t c0 = nearest_integers(vmulq_n_f32(load4(x), scale)), c1 = nearest_integers(vmulq_n_f32(load4(x + 4), scale));
    const int32x4_t c2 = nearest_integers(vmulq_n_f32(load4(x + 8), scale)), c3 = nearest_integers(vmulq_n_f32(load4(x + 12), scale));
    const int16x8_t low = vcombine_s16(vqmovn_s32(c0), vqmovn_s32(c1)), high = vcombine_s16(vqmovn_s32(c2), vqmovn_s32(c3));
    return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

/// Calls `body(x, k, count)` for 16 elements of a row at a time; the last are copied and filled up with zeros if they are fewer.
template <class T, class Body>
inline void for_row(const T *x, int64_t K, const Body &body) {
    int64_t k = 0;
    for (; k + int8_step <= K; k += int8_step) body(x + k, k, int8_step);
    if (k == K) return;
    T rest[int8_step] = {};
    std::copy(x + k, x + K, rest);
    body(rest, k, K - k);
}

/// The largest magnitude below the threshold; NaN if there is no threshold and a NaN.
template <class T>
inline float int8_row_absmax(const T *x, int64_t K, const OutlierTest &outliers) {
    if (!outliers.any()) return largest_magnitude(x, K);
    uint32x4_t largest[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
    for_row(x, K, [&](const T *part, int64_t, int64_t) {
        for (int i = 0; i < 4; ++i) largest[i] = vmaxq_u32(largest[i], outliers.regular(load4(part + 4 * i)));
    });
    const uint32x4_t all = vmaxq_u32(vmaxq_u32(largest[0], largest[1]), vmaxq_u32(largest[2], largest[3]));
    return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(vmaxvq_u32(all))), 0);
}

/// Fills the codes of a row and returns its absmax. The codes of outlier columns, given with a byte each, are 0.
template <class T>
inline float int8_quantize_row(const T *x, int64_t K, const OutlierTest &outliers, const uint8_t *outlier_mask, int8_t *codes) {
    const float absmax = int8_row_absmax(x, K, outliers);
    const float scale = int8_scale(absmax);
    for_row(x, K, [&](const T *part, int64_t k, int64_t count) {
        int8x16_t found = int8_codes(part, scale);
        if (count == int8_step) {
            if (outliers.any()) found = vandq_s8(found, vreinterpretq_s8_u8(vceqq_u8(vld1q_u8(outlier_mask + k), vdupq_n_u8(0))));
            vst1q_s8(codes + k, found);
            return;
        }
        int8_t rest[int8_step];
        vst1q_s8(rest, found);
        for (int64_t i = 0; i < count; ++i) codes[k + i] = outliers.any() && outlier_mask[k + i] ? int8_t{0} : rest[i];
    });
    return absmax;
}

/// Fills outlier_mask for the columns in [begin, end).
template <class T>
inline void int8_find_outliers(
    const T *x, int64_t M, int64_t K, const OutlierTest &outliers, int64_t begin, int64_t end, uint8_t *outlier_mask) {
    int64_t k = begin;
    for (; k + 4 <= end; k += 4) {
        uint32x4_t reached = vdupq_n_u32(0);
        for (int64_t m = 0; m < M; ++m) reached = vorrq_u32(reached, outliers.reached(load4(x + m * K + k)));
        uint32_t lanes[4];
        vst1q_u32(lanes, reached);
        for (int i = 0; i < 4; ++i) outlier_mask[k + i] = lanes[i] & 1;
    }
    for (; k < end; ++k) {
        uint32x4_t reached = vdupq_n_u32(0);
        for (int64_t m = 0; m < M; ++m) reached = vorrq_u32(reached, outliers.reached(vdupq_n_f32(load1(x + m * K + k))));
        outlier_mask[k] = vgetq_lane_u32(reached, 0) & 1;
    }
}

}  // namespace bnb
