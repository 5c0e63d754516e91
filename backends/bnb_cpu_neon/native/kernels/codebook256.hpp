/// A codebook of 256 entries, prepared for finding the nearest entry of many values.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>

#include "elements.hpp"

namespace bnb {

/// Finds codes as bnb_core.ops.spec defines them: by the number of midpoints strictly below a value; NaN counts as 0.
///
/// The upper 16 bits of a float32 number put it in one of 65536 buckets, so narrow that hardly ever more than one midpoint is
/// inside: neighbouring entries must be within 2^-7 of each other, relative to their size. So an entry of the table is a
/// midpoint's lower 16 bits and the codes on both sides of it. A codebook of which that is not true is searched from the
/// bucket's first midpoint on.
class Codebook256 {
  public:
    explicit Codebook256(const float *entries);

    /// The prepared form of a codebook; kept for the next call with the same 256 numbers, wherever these are.
    static std::shared_ptr<const Codebook256> of(const float *entries);

    const float *entries() const { return entries_.data(); }

    /// The code of 0, which also stands for NaN.
    uint8_t code_of_zero() const { return code_of_rank_[rank_of_zero_]; }

    /// Fills `codes` with those of `count` values times `scale`.
    template <class T>
    void encode(const T *values, int64_t count, float scale, uint8_t *codes) const {
        if (!isolated_) {
            for (int64_t i = 0; i < count; ++i) codes[i] = search(load1(values + i) * scale);
            return;
        }
        for (; count >= step; count -= step, values += step, codes += step) look_up(values, scale, codes);
        if (count) look_up_rest(values, count, scale, codes);
    }

  private:
    static constexpr int step = 32;

    /// The codes of `step` values. Buckets go through memory, which takes fewer instructions than collecting them in registers;
    /// there are so many that the first are written long before they are read.
    template <class T>
    BNB_INLINE void look_up(const T *values, float scale, uint8_t *codes) const {
        float32x4_t s[step / 4];
        uint32_t found[step];
        for (int i = 0; i < step / 4; ++i) {
            s[i] = vmulq_n_f32(load4(values + 4 * i), scale);
            const uint16x8_t halves = vreinterpretq_u16_f32(s[i]);
            found[4 * i] = buckets_[vgetq_lane_u16(halves, 1)];
            found[4 * i + 1] = buckets_[vgetq_lane_u16(halves, 3)];
            found[4 * i + 2] = buckets_[vgetq_lane_u16(halves, 5)];
            found[4 * i + 3] = buckets_[vgetq_lane_u16(halves, 7)];
        }
        for (int i = 0; i < step; i += 16) {
            const uint16x8x2_t first = vld2q_u16(reinterpret_cast<const uint16_t *>(found + i));
            const uint16x8x2_t second = vld2q_u16(reinterpret_cast<const uint16_t *>(found + i + 8));
            const uint8x16_t codes_a = vreinterpretq_u8_u16(first.val[1]), codes_b = vreinterpretq_u8_u16(second.val[1]);
            const uint8x16_t above = vuzp1q_u8(
                is_above(s[i / 4], s[i / 4 + 1], first.val[0]), is_above(s[i / 4 + 2], s[i / 4 + 3], second.val[0]));
            vst1q_u8(codes + i, vbslq_u8(above, vuzp2q_u8(codes_a, codes_b), vuzp1q_u8(codes_a, codes_b)));
        }
    }

    /// The same for fewer values.
    template <class T>
    __attribute__((noinline)) void look_up_rest(const T *values, int64_t count, float scale, uint8_t *codes) const {
        T rest[step] = {};
        uint8_t found[step];
        std::copy(values, values + count, rest);
        look_up(rest, scale, found);
        std::copy(found, found + count, codes);
    }

    /// Whether the lower 16 bits of eight values are above those of their buckets' midpoints.
    static uint8x16_t is_above(float32x4_t a, float32x4_t b, uint16x8_t midpoints) {
        const uint16x8_t values = vuzp1q_u16(vreinterpretq_u16_f32(a), vreinterpretq_u16_f32(b));
        return vreinterpretq_u8_u16(vcgtq_u16(values, midpoints));
    }

    uint8_t search(float value) const {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        uint32_t rank = value == value ? buckets_[bits >> 16] : rank_of_zero_;
        while (midpoints_[rank] < value) ++rank;
        return code_of_rank_[rank];
    }

    /// The rank of a value, quickly if it is near the given one.
    uint32_t rank_from(uint32_t rank, float value) const;

    /// By the upper 16 bits of a value. Where buckets are isolated: from the lowest bit on, 16 bits that the value's lower ones
    /// are compared with, the code if they are not above, and the code if they are. Else: the rank of the bucket's least value.
    std::array<uint32_t, 1 << 16> buckets_;
    std::array<float, 256> entries_;
    std::array<float, 256> midpoints_;  ///< ascending; the last is infinite
    std::array<uint8_t, 256> code_of_rank_;
    uint32_t rank_of_zero_ = 0;
    bool isolated_ = true;  ///< no bucket has two different midpoints
};

}  // namespace bnb
