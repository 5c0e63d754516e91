/// NEON: the compiler's own on aarch64, SIMDe's emulation elsewhere.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/arm/neon.h>
#endif

#include <cstddef>
#include <type_traits>
#include <utility>

/// For what lies in an innermost loop: compilers would rather call a lambda than keep its captures in registers.
#define BNB_INLINE __attribute__((always_inline))

namespace bnb {

namespace detail {
template <class Body, std::size_t... indices>
BNB_INLINE inline void unroll(const Body &body, std::index_sequence<indices...>) {
    (body(std::integral_constant<int, indices>()), ...);
}
}  // namespace detail

/// Calls `body` with 0, 1, … count - 1 as constants, so that arrays which it indexes stay in registers.
template <std::size_t count, class Body>
BNB_INLINE inline void unroll(const Body &body) {
    detail::unroll(body, std::make_index_sequence<count>());
}

/// Four float16 numbers, as bits, to float32; exact.
inline float32x4_t widen_half(uint16x4_t bits) {
#if defined(__aarch64__)
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
#else  // SIMDe converts one number at a time
    uint16_t halves[8] = {};
    vst1_u16(halves, bits);
    float floats[4];
    _mm_storeu_ps(floats, _mm_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(halves))));
    return vld1q_f32(floats);
#endif
}

/// Four float32 numbers to the nearest float16, ties to even, as bits.
inline uint16x4_t narrow_to_half(float32x4_t values) {
#if defined(__aarch64__)
    return vreinterpret_u16_f16(vcvt_f16_f32(values));
#else
    float floats[4];
    vst1q_f32(floats, values);
    uint16_t halves[8];
    _mm_storeu_si128(reinterpret_cast<__m128i *>(halves), _mm_cvtps_ph(_mm_loadu_ps(floats), _MM_FROUND_TO_NEAREST_INT));
    return vld1_u16(halves);
#endif
}

/// Four bfloat16 numbers, as bits, to float32; exact.
inline float32x4_t widen_bfloat16(uint16x4_t bits) {
#if defined(__aarch64__)
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
#else  // SIMDe refuses to shift by a whole element
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16));
#endif
}

/// a / b, rounded as IEEE says; SIMDe lacks this and the next two.
inline float32x4_t divide(float32x4_t a, float32x4_t b) {
#if defined(__aarch64__)
    return vdivq_f32(a, b);
#else
    return simde_float32x4_from_private([&] {
        simde_float32x4_private x = simde_float32x4_to_private(a), y = simde_float32x4_to_private(b);
        x.m128 = _mm_div_ps(x.m128, y.m128);
        return x;
    }());
#endif
}

inline float32x4_t square_root(float32x4_t a) {
#if defined(__aarch64__)
    return vsqrtq_f32(a);
#else
    return simde_float32x4_from_private([&] {
        simde_float32x4_private x = simde_float32x4_to_private(a);
        x.m128 = _mm_sqrt_ps(x.m128);
        return x;
    }());
#endif
}

/// The nearest integers, halves to even; 0 for NaN.
inline int32x4_t nearest_integers(float32x4_t a) {
#if defined(__aarch64__)
    return vcvtnq_s32_f32(a);
#else
    return vcvtq_s32_f32(vrndnq_f32(a));
#endif
}

// SIMDe lacks these two as well: `low` with the bits of `high`, shifted left by n, above its own n lowest.

template <int n>
inline uint8x16_t put_above(uint8x16_t low, uint8x16_t high) {
#if defined(__aarch64__)
    return vsliq_n_u8(low, high, n);
#else
    return vorrq_u8(vandq_u8(low, vdupq_n_u8((1 << n) - 1)), vshlq_n_u8(high, n));
#endif
}

template <int n>
inline uint32x4_t put_above(uint32x4_t low, uint32x4_t high) {
#if defined(__aarch64__)
    return vsliq_n_u32(low, high, n);
#else
    return vorrq_u32(vandq_u32(low, vdupq_n_u32((1u << n) - 1)), vshlq_n_u32(high, n));
#endif
}

/// 64 bytes from memory of any alignment.
inline uint8x16x4_t load_64(const uint8_t *p) {
#if defined(__clang__) || __GNUC__ >= 10
    return vld1q_u8_x4(p);
#else
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
#endif
}

/// 16 float32 numbers, in order, of which each argument has one byte; the lowest first.
BNB_INLINE inline float32x4x4_t join_bytes(uint8x16_t byte0, uint8x16_t byte1, uint8x16_t byte2, uint8x16_t byte3) {
    const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(byte0, byte1)), low1 = vreinterpretq_u16_u8(vzip2q_u8(byte0, byte1));
    const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(byte2, byte3)), high1 = vreinterpretq_u16_u8(vzip2q_u8(byte2, byte3));
    return {{vreinterpretq_f32_u16(vzip1q_u16(low0, high0)), vreinterpretq_f32_u16(vzip2q_u16(low0, high0)),
             vreinterpretq_f32_u16(vzip1q_u16(low1, high1)), vreinterpretq_f32_u16(vzip2q_u16(low1, high1))}};
}

/// Keeps the compiler from loading what `next` points to before it has computed `done`: it would overlap more than the registers
/// hold, and spill. The CPU, which has more of them, sees nothing of it.
template <class Vector, class Element>
BNB_INLINE inline void load_after(const Vector &done, const Element *&next) {
#if defined(__aarch64__)
    asm("" : "+r"(next) : "w"(done));
#else
    (void)done, (void)next;
#endif
}

/// Keeps loads and stores before it apart from those after it, and scalars that are copied out of vector registers.
BNB_INLINE inline void keep_order() {
#if defined(__aarch64__)
    asm volatile("" : : : "memory");
#endif
}

// What these are given, the compiler takes for another value, which it knows nothing of.

BNB_INLINE inline void hide(uint8x16_t &value) {
#if defined(__aarch64__)
    asm("" : "+w"(value));
#else
    (void)value;
#endif
}

template <class Element>
BNB_INLINE inline void hide(Element *&pointer) {
#if defined(__aarch64__)
    asm("" : "+r"(pointer));
#else
    (void)pointer;
#endif
}

// Both take bits of `a` where the mask is set, and else of `b`. Compilers that know some of the bits would make more than one
// instruction of it. The result takes the place of `b`, or that of the mask.

BNB_INLINE inline uint32x4_t select_bits(uint32x4_t mask, uint32x4_t a, uint32x4_t b) {
#if defined(__aarch64__)
    asm("bit %0.16b, %1.16b, %2.16b" : "+w"(b) : "w"(a), "w"(mask));
    return b;
#else
    return vbslq_u32(mask, a, b);
#endif
}

BNB_INLINE inline uint32x4_t select_by_last_use(uint32x4_t mask, uint32x4_t a, uint32x4_t b) {
#if defined(__aarch64__)
    asm("bsl %0.16b, %1.16b, %2.16b" : "+w"(mask) : "w"(a), "w"(b));
    return mask;
#else
    return vbslq_u32(mask, a, b);
#endif
}

}  // namespace bnb
