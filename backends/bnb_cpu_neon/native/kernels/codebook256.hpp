/// A codebook of 256 entries, prepared for finding the nearest entry of many values.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "simd.hpp"

namespace bnb {

/// Finds the nearest entry exactly: ties go to the lower, as bnb_core.ops.spec defines.
///
/// The upper bits of a value (sign, exponent, 6 bits of the mantissa) name a bucket of values. Of each bucket it is known how many
/// midpoints lie below all of it, and which comes next: one comparison with that decides, unless the bucket holds several.
class Codebook256 {
  public:
    explicit Codebook256(const float *entries);

    /// The prepared form of a codebook; kept for the next call with the same 256 numbers, wherever these are.
    static std::shared_ptr<const Codebook256> of(const float *entries);

    /// The value of a code.
    float operator[](uint8_t code) const { return entries_[code]; }
    const float *entries() const { return entries_.data(); }

    /// The code of 0, which also stands for NaN.
    uint8_t code_of_zero() const { return code_of_zero_; }

    /// The codes of 16 values, finite and of magnitude below 2.
    BNB_INLINE uint8x16_t nearest(const float32x4x4_t &s) const {
        uint32x4x4_t ranks;
        unroll<4>([&](auto i) BNB_INLINE { ranks.val[i] = rank(s.val[i]); });
        if (comparisons_ > 1) ranks = compare_again(s, ranks);
        const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(ranks.val[0]), vreinterpretq_u16_u32(ranks.val[1]));
        const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(ranks.val[2]), vreinterpretq_u16_u32(ranks.val[3]));
        const uint8x16_t bytes = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
        return ranks_are_codes_ ? bytes : codes_of(bytes);
    }

    /// The code of one value, finite and of magnitude below 2.
    uint8_t nearest(float s) const {
        const float32x4_t all = vdupq_n_f32(s);
        return vgetq_lane_u8(nearest(float32x4x4_t{{all, all, all, all}}), 0);
    }

  private:
    struct Bucket {
        float midpoint;  ///< the first that is not below the whole bucket; infinity if there is none
        uint32_t rank;   ///< midpoints below the whole bucket
    };
    static constexpr uint32_t lowest_bits = 0x30800000;  ///< 2^-30: smaller magnitudes share a bucket
    static constexpr int mantissa_shift = 17;
    static constexpr int sign_bit = 11;
    static constexpr std::size_t buckets = 2 << sign_bit;

    /// The ranks of four values, or less where a bucket holds several midpoints.
    BNB_INLINE uint32x4_t rank(float32x4_t s) const {
        const uint32x4_t bits = vreinterpretq_u32_f32(s);
        const uint32x4_t magnitude = vqsubq_u32(vshlq_n_u32(bits, 1), vdupq_n_u32(lowest_bits << 1));
        const uint32x4_t number = put_above<sign_bit>(vshrq_n_u32(magnitude, mantissa_shift + 1), vshrq_n_u32(bits, 31));
        const uint32x4_t first = vcombine_u32(bucket(vgetq_lane_u32(number, 0)), bucket(vgetq_lane_u32(number, 1)));
        const uint32x4_t second = vcombine_u32(bucket(vgetq_lane_u32(number, 2)), bucket(vgetq_lane_u32(number, 3)));
        const float32x4_t midpoints = vreinterpretq_f32_u32(vuzp1q_u32(first, second));
        return vsubq_u32(vuzp2q_u32(first, second), vcgtq_f32(s, midpoints));
    }

    uint32x2_t bucket(uint32_t number) const { return vld1_u32(reinterpret_cast<const uint32_t *>(&buckets_[number])); }

    uint32x4x4_t compare_again(float32x4x4_t s, uint32x4x4_t ranks) const;
    uint8x16_t codes_of(uint8x16_t ranks) const;

    std::array<float, 256> entries_;
    std::array<float, 256> midpoints_;  ///< each once, ascending; then infinity
    std::array<uint8_t, 256> code_of_rank_;
    std::array<Bucket, buckets> buckets_;
    int comparisons_;  ///< as many as a bucket holds midpoints, at most; at least 1
    bool ranks_are_codes_;
    uint8_t code_of_zero_;
};

}  // namespace bnb
