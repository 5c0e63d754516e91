/// One row of x, in int8, by eight rows of a 4-bit weight: the inner loop of which tiers differ by one instruction.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace bnb::fast {

/// Rows of the weight that share what is loaded of x.
constexpr int rows_at_once = 8;
/// Elements that 16 packed bytes hold: those at even places in the high halves, those at odd ones in the low.
constexpr int64_t step = 32;
/// Blocks whose scales are worked out at a time.
constexpr int64_t most_blocks = 128;

/// What the products of blocks are multiplied by: for each half of the rows of the weight, for each block, those of 4 rows.
using Scales = float[2][most_blocks][rows_at_once / 2];

/// Blocks of a row of x.
struct Blocks {
    const int8_t *codes;  ///< of each `step`, those at even places and then those at odd ones
    int64_t count, blocksize;
};

/// Adds the products of at most `most_blocks` blocks with 8 rows of packed codes to `sums` [8]. `table` has the int8 value of each
/// code.
///
/// The sum of a block is an exact integer; it is scaled and added in float32, block by block.
using DotRows = void(
    const Blocks &x, const uint8_t *const (&packed)[rows_at_once], int8x16_t table, const Scales &scales, float *sums);

/// One for each tier that has an instruction for it.
DotRows dot_rows_baseline, dot_rows_dotprod;

/// The same, with `add_products(sum, a, b)` that adds the products of 16 codes to four sums. Neither -128.
template <class AddProducts>
BNB_INLINE inline void dot_rows(
    const Blocks x, const uint8_t *const (&packed)[rows_at_once], int8x16_t table, const Scales &scales, float *sums,
    const AddProducts &add_products) {
    const uint8_t *rows[rows_at_once];
    unroll<rows_at_once>([&](auto row) BNB_INLINE { rows[row] = packed[row]; });
    const int8_t *codes = x.codes;
    float32x4_t low = vld1q_f32(sums), high = vld1q_f32(sums + 4);
    int64_t at = 0;
    for (int64_t block = 0; block < x.count; ++block) {
        int32x4_t parts[rows_at_once];
        unroll<rows_at_once>([&](auto row) BNB_INLINE { parts[row] = vdupq_n_s32(0); });
        const auto add_step = [&]() BNB_INLINE {
            const int8x16_t even = vld1q_s8(codes), odd = vld1q_s8(codes + step / 2);
            unroll<rows_at_once>([&](auto row) BNB_INLINE {
                const uint8x16_t pairs = vld1q_u8(rows[row] + at);
                parts[row] = add_products(parts[row], vqtbl1q_s8(table, vshrq_n_u8(pairs, 4)), even);
                parts[row] = add_products(parts[row], vqtbl1q_s8(table, vandq_u8(pairs, vdupq_n_u8(15))), odd);
            });
            at += step / 2;
            codes += step;
        };
        if (x.blocksize == step) add_step();
        for (int64_t pair = x.blocksize / (2 * step); pair; --pair) {
            add_step();
            add_step();
        }
        const int32x4_t first = vpaddq_s32(vpaddq_s32(parts[0], parts[1]), vpaddq_s32(parts[2], parts[3]));
        const int32x4_t last = vpaddq_s32(vpaddq_s32(parts[4], parts[5]), vpaddq_s32(parts[6], parts[7]));
        low = vfmaq_f32(low, vcvtq_f32_s32(first), vld1q_f32(scales[0][block]));
        high = vfmaq_f32(high, vcvtq_f32_s32(last), vld1q_f32(scales[1][block]));
    }
    vst1q_f32(sums, low);
    vst1q_f32(sums + 4, high);
}

}  // namespace bnb::fast
