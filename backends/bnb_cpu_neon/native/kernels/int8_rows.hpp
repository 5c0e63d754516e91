/// Values of int8 rows.
#pragma once

#include <cstdint>

#include "elements.hpp"

namespace bnb {

/// What the codes of a row are multiplied by.
inline float int8_row_scale(float absmax) { return absmax * (1.0f / 127.0f); }

/// Fills `out` with the n values of a row.
template <class T>
inline void dequantize_int8_row(const int8_t *codes, float scale, int64_t n, T *out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const int16x8_t wide = vmovl_s8(vld1_s8(codes + i));
        store4(out + i, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), scale));
        store4(out + i + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide))), scale));
    }
    for (; i < n; ++i) store1(out + i, static_cast<float>(codes[i]) * scale);
}

}  // namespace bnb
