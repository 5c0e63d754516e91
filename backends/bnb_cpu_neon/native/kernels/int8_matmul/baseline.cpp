/// int8 products on any core: 8-bit products, added up in 16 and then in 32 bits.
#include "kernels/int8_matmul/tile.hpp"

namespace bnb::int8 {
namespace {

/// sum + x w, four products in each lane. With `full_range` x may hold -128: two of its products may then not fit 16 bits.
template <bool full_range>
inline int32x4_t add_products(int32x4_t sum, int8x16_t x, int8x16_t w) {
    const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w));
    if (full_range) return vpadalq_s16(vpadalq_s16(sum, low), vmull_high_s8(x, w));
    return vpadalq_s16(sum, vmlal_high_s8(low, x, w));
}

/// The sums of the lanes of each of four vectors.
inline int32x4_t add_lanes(const int32x4_t *four) { return vpaddq_s32(vpaddq_s32(four[0], four[1]), vpaddq_s32(four[2], four[3])); }

/// Packed rows are rows all the same, filled up with zeros.
void pack(Rows rows, int64_t K, int8_t *packed) {
    for (int i = 0; i < tile_size; ++i)
        for (int64_t k = 0; k < K; k += columns_step, packed += columns_step) vst1q_s8(packed, load_left(rows[i], K, k));
}

template <bool full_range>
void multiply(const int8_t *packed, Rows right, int64_t K, Sums sums) {
    constexpr int part = tile_size / 2;  // a quarter of the tile is what registers hold
    const int64_t stride = packed_columns(K);
    for (int top = 0; top < tile_size; top += part) {
        for (int left = 0; left < tile_size; left += part) {
            int32x4_t sum[part][part];
            for (auto &row : sum)
                for (int32x4_t &four : row) four = vdupq_n_s32(0);
            for_columns(K, [&](int64_t k, int64_t column) BNB_INLINE {
                int8x16_t x[part];
                for (int i = 0; i < part; ++i) x[i] = vld1q_s8(packed + (top + i) * stride + k);
                for (int j = 0; j < part; ++j) {
                    const int8x16_t w = vld1q_s8(right[left + j] + column);
                    for (int i = 0; i < part; ++i) sum[i][j] = add_products<full_range>(sum[i][j], x[i], w);
                }
            });
            for (int i = 0; i < part; ++i) vst1q_s32(sums[top + i] + left, add_lanes(sum[i]));
        }
    }
}

template <bool full_range>
void multiply_row(const int8_t *left, Rows right, int64_t K, int32_t *sums) {
    int32x4_t sum[tile_size];
    for (int32x4_t &four : sum) four = vdupq_n_s32(0);
    for_columns(K, [&](int64_t k, int64_t column) BNB_INLINE {
        const int8x16_t x = load_left(left, K, k);
        for (int j = 0; j < tile_size; ++j) sum[j] = add_products<full_range>(sum[j], x, vld1q_s8(right[j] + column));
    });
    for (int j = 0; j < tile_size; j += 4) vst1q_s32(sums + j, add_lanes(sum + j));
}

}  // namespace

const Kernels baseline = {7, pack, multiply<false>, multiply_row<false>};
const Kernels baseline_full_range = {7, pack, multiply<true>, multiply_row<true>};

}  // namespace bnb::int8
