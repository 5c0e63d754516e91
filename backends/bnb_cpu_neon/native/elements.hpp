/// The element types that kernels read and write. Everything is computed in float32; float16 and bfloat16 are formats of storage.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace bnb {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

/// A dtype at run time; the order is that of bnb_cpu_neon.engine.DTYPES.
enum class DType { float32, float16, bfloat16 };

/// Calls `body` with a value of the C++ type that stands for `dtype`; only the type matters.
template <class Body>
auto with_type(DType dtype, const Body &body) {
    switch (dtype) {
        case DType::float16:
            return body(Half{});
        case DType::bfloat16:
            return body(BFloat16{});
        default:
            return body(float{});
    }
}

// Four elements from and to memory of any alignment. Storing rounds to nearest, ties to even.

inline float32x4_t load4(const float *p) { return vld1q_f32(p); }

inline float32x4_t load4(const Half *p) { return widen_half(vld1_u16(&p->bits)); }

inline float32x4_t load4(const BFloat16 *p) { return widen_bfloat16(vld1_u16(&p->bits)); }

inline void store4(float *p, float32x4_t values) { vst1q_f32(p, values); }

inline void store4(Half *p, float32x4_t values) { vst1_u16(&p->bits, narrow_to_half(values)); }

/// The upper half of each float32, rounded; a NaN stays one.
inline uint16x4_t narrow_to_bfloat16(float32x4_t values) {
    const uint32x4_t bits = vreinterpretq_u32_f32(values);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(values, values);
    return vshrn_n_u32(vbslq_u32(number, rounded, vorrq_u32(bits, vdupq_n_u32(0x00400000))), 16);
}

inline void store4(BFloat16 *p, float32x4_t values) { vst1_u16(&p->bits, narrow_to_bfloat16(values)); }

// One element.

inline float load1(const float *p) { return *p; }

inline float load1(const Half *p) { return vgetq_lane_f32(widen_half(vdup_n_u16(p->bits)), 0); }

inline float load1(const BFloat16 *p) { return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(uint32_t{p->bits} << 16)), 0); }

inline void store1(float *p, float value) { *p = value; }

inline void store1(Half *p, float value) { p->bits = vget_lane_u16(narrow_to_half(vdupq_n_f32(value)), 0); }

inline void store1(BFloat16 *p, float value) { p->bits = vget_lane_u16(narrow_to_bfloat16(vdupq_n_f32(value)), 0); }

}  // namespace bnb
