/// quantize_4bit: one form for all tiers.
#include <cstring>

#include "kernels/blocks.hpp"
#include "kernels/four_bit.hpp"
#include "kernels/ranked.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 14;

/// Finds ranks among 15 midpoints by bisection, in all lanes at once.
///
/// A rank is kept as the byte offsets of a float in a table, (4r, 4r+1, 4r+2, 4r+3), which is what a table instruction takes to
/// fetch the next midpoint to compare with.
class Bisection {
  public:
    explicit Bisection(const Ranked<16> &ranked) : codes_(vld1q_u8(ranked.code_of_rank.data())) {
        float second[16] = {}, last[16] = {};  // indexed by the rank so far
        for (std::size_t rank = 0; rank < 16; ++rank) {
            if (rank + 1 < 15) second[rank] = ranked.midpoints[rank + 1];
            if (rank < 15) last[rank] = ranked.midpoints[rank];
        }
        for (int i = 0; i < 4; ++i) {
            second_.val[i] = vreinterpretq_u8_f32(vld1q_f32(second + 4 * i));
            last_.val[i] = vreinterpretq_u8_f32(vld1q_f32(last + 4 * i));
        }
        middle_ = vdupq_n_f32(ranked.midpoints[7]);
        lower_ = vdupq_n_f32(ranked.midpoints[3]);
        upper_ = vdupq_n_f32(ranked.midpoints[11]);
    }

    /// The codes of 16 scaled values, none of them NaN.
    template <class T>
    BNB_INLINE uint8x16_t operator()(const T *x, float scale) const {
        uint8x16_t offsets[4];
        unroll<4>([&](auto i) BNB_INLINE { offsets[i] = search(vmulq_n_f32(load4(x + 4 * i), scale)); });
        const uint8x16_t ranks = vuzp1q_u8(vuzp1q_u8(offsets[0], offsets[1]), vuzp1q_u8(offsets[2], offsets[3]));
        return vqtbl1q_u8(codes_, vshrq_n_u8(ranks, 2));
    }

  private:
    BNB_INLINE uint8x16_t search(float32x4_t s) const {
        const uint32x4_t above = vcgtq_f32(s, middle_);
        const float32x4_t next = vbslq_f32(above, upper_, lower_);
        uint32x4_t offsets = select_by_last_use(above, vdupq_n_u32(0x23222120), vdupq_n_u32(0x03020100));
        offsets = advance(offsets, vcgtq_f32(s, next), 4);
        offsets = advance(offsets, vcgtq_f32(s, look_up(second_, offsets)), 2);
        return vreinterpretq_u8_u32(advance(offsets, vcgtq_f32(s, look_up(last_, offsets)), 1));
    }

    static float32x4_t look_up(const uint8x16x4_t &table, uint32x4_t offsets) {
        return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(offsets)));
    }

    /// Adds `ranks`, a power of two that is not in the offsets yet, where the other mask is all ones.
    static uint32x4_t advance(uint32x4_t offsets, uint32x4_t above, uint32_t ranks) {
        return select_bits(vdupq_n_u32(ranks * 0x04040404), above, offsets);
    }

    uint8x16_t codes_;
    uint8x16x4_t second_, last_;
    float32x4_t middle_, lower_, upper_;
};

/// Packs the codes of 32 elements.
template <class T>
BNB_INLINE inline void quantize_step(const Bisection &codes_of, const T *x, float scale, uint8_t *packed) {
    uint8x16_t first = codes_of(x, scale);
    load_after(first, x);
    const uint8x16_t second = codes_of(x + 16, scale);
    vst1q_u8(packed, put_above<4>(vuzp2q_u8(first, second), vuzp1q_u8(first, second)));
}

/// Packs the codes of fewer elements than that. Takes a copy, so that the other's stays in registers.
template <class T>
__attribute__((noinline)) void quantize_rest(const Bisection codes_of, const T *x, int64_t n, float scale, uint8_t *packed) {
    T rest[packed_step] = {};  // the nibble that an odd n leaves over holds the code of 0
    uint8_t bytes[packed_step / 2];
    std::memcpy(rest, x, static_cast<std::size_t>(n) * sizeof(T));
    quantize_step(codes_of, rest, scale, bytes);
    std::memcpy(packed, bytes, static_cast<std::size_t>(n + 1) / 2);
}

template <class T>
BNB_INLINE inline void quantize_block(
    const Bisection &codes_of, uint8_t zero_pair, const T *x, int64_t n, uint8_t *packed, float *absmax) {
    *absmax = largest_magnitude(x, n);
    if (std::isfinite(*absmax)) {
        const float scale = block_scale(*absmax);
        for (; n >= packed_step; n -= packed_step, x += packed_step, packed += packed_step / 2) quantize_step(codes_of, x, scale, packed);
        if (n) quantize_rest(codes_of, x, n, scale, packed);
    } else {  // scaled values are 0 or NaN
        std::memset(packed, zero_pair, static_cast<std::size_t>(n + 1) / 2);
    }
}

/// Quantizes n elements, of which the last block may be shorter. Takes copies, which no store to `packed` can change.
template <class T>
void quantize_blocks(
    const Bisection codes_of, uint8_t zero_pair, const T *x, int64_t n, int64_t blocksize, uint8_t *packed, float *absmax) {
    const int64_t steps = blocksize / packed_step;
    for (; n >= blocksize; n -= blocksize, x += blocksize, packed += blocksize / 2, ++absmax) {
        quantize_block(codes_of, zero_pair, x, steps * packed_step, packed, absmax);  // known to be whole steps
    }
    if (n) quantize_block(codes_of, zero_pair, x, n, packed, absmax);
}

}  // namespace

void quantize_4bit(
    DType dtype, const void *x, int64_t n, const float *codebook, int64_t blocksize, uint8_t *packed, float *absmax, int threads) {
    const Ranked<16> ranked(codebook);
    const Bisection codes_of(ranked);
    const uint8_t zero_pair = static_cast<uint8_t>(ranked.code_of_zero() * 0x11);
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    with_type(dtype, [&](auto element) {
        const auto *values = static_cast<const decltype(element) *>(x);
        parallel_for(threads, blocks, std::max<int64_t>(1, grain / blocksize), [&](int64_t begin, int64_t end) {
            const int64_t start = begin * blocksize, count = std::min(n, end * blocksize) - start;
            quantize_blocks(codes_of, zero_pair, values + start, count, blocksize, packed + start / 2, absmax + begin);
        });
    });
}

}  // namespace bnb
