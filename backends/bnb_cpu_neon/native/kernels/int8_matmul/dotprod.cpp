/// int8 products where a CPU has `asimddp`: each instruction adds four products in each of four lanes.
///
/// Four rows on the left are packed together, four columns of each in turn, and multiplied by one lane of a row on the right: so
/// the four lanes of a sum are four rows, and none is added up across lanes at the end.
#include "kernels/int8_matmul/tile.hpp"

namespace bnb::int8 {
namespace {

/// Four vectors whose i-th lanes were in vector i.
inline int32x4x4_t transpose(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    const int32x4_t ac_low = vzip1q_s32(a, c), ac_high = vzip2q_s32(a, c), bd_low = vzip1q_s32(b, d), bd_high = vzip2q_s32(b, d);
    return {{vzip1q_s32(ac_low, bd_low), vzip2q_s32(ac_low, bd_low), vzip1q_s32(ac_high, bd_high), vzip2q_s32(ac_high, bd_high)}};
}

void pack(Rows rows, int64_t K, int8_t *packed) {
    for (int64_t k = 0; k < K; k += columns_step) {
        for (int group = 0; group < 2; ++group, packed += 4 * columns_step) {
            const auto load = [&](int row) { return vreinterpretq_s32_s8(load_left(rows[4 * group + row], K, k)); };
            const int32x4x4_t columns = transpose(load(0), load(1), load(2), load(3));
            for (int i = 0; i < 4; ++i) vst1q_s8(packed + i * columns_step, vreinterpretq_s8_s32(columns.val[i]));
        }
    }
}

void multiply(const int8_t *packed, Rows right, int64_t K, Sums sums) {
    int32x4_t low[tile_size], high[tile_size];  // by row on the right: sums of rows 0 to 3 and 4 to 7 on the left
    for (int j = 0; j < tile_size; ++j) low[j] = high[j] = vdupq_n_s32(0);
    for_columns(K, [&](int64_t, int64_t column) BNB_INLINE {
        int8x16_t w[tile_size];
        for (int j = 0; j < tile_size; ++j) w[j] = vld1q_s8(right[j] + column);
        const auto step = [&](int32x4_t(&sum)[tile_size]) BNB_INLINE {
            const int8x16_t x0 = vld1q_s8(packed), x1 = vld1q_s8(packed + 16), x2 = vld1q_s8(packed + 32), x3 = vld1q_s8(packed + 48);
            for (int j = 0; j < tile_size; ++j) sum[j] = vdotq_laneq_s32(sum[j], x0, w[j], 0);
            for (int j = 0; j < tile_size; ++j) sum[j] = vdotq_laneq_s32(sum[j], x1, w[j], 1);
            for (int j = 0; j < tile_size; ++j) sum[j] = vdotq_laneq_s32(sum[j], x2, w[j], 2);
            for (int j = 0; j < tile_size; ++j) sum[j] = vdotq_laneq_s32(sum[j], x3, w[j], 3);
            packed += 4 * columns_step;
        };
        step(low);
        step(high);
    });
    for (int j = 0; j < tile_size; j += 4) {
        const int32x4x4_t first = transpose(low[j], low[j + 1], low[j + 2], low[j + 3]);
        const int32x4x4_t last = transpose(high[j], high[j + 1], high[j + 2], high[j + 3]);
        for (int i = 0; i < 4; ++i) {
            vst1q_s32(sums[i] + j, first.val[i]);
            vst1q_s32(sums[4 + i] + j, last.val[i]);
        }
    }
}

}  // namespace

void multiply_row_dotprod(const int8_t *left, Rows right, int64_t K, int32_t *sums) {
    int32x4_t sum[tile_size];
    for (int j = 0; j < tile_size; ++j) sum[j] = vdupq_n_s32(0);
    for_columns(K, [&](int64_t k, int64_t column) BNB_INLINE {
        const int8x16_t x = load_left(left, K, k);
        for (int j = 0; j < tile_size; ++j) sum[j] = vdotq_s32(sum[j], x, vld1q_s8(right[j] + column));
    });
    for (int j = 0; j < tile_size; j += 4) {
        vst1q_s32(sums + j, vpaddq_s32(vpaddq_s32(sum[j], sum[j + 1]), vpaddq_s32(sum[j + 2], sum[j + 3])));
    }
}

const Kernels dotprod = {5, pack, multiply, multiply_row_dotprod};

}  // namespace bnb::int8
