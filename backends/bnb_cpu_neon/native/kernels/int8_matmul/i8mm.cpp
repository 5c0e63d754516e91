/// int8 products where a CPU has `i8mm`: each instruction multiplies two rows by two, along eight columns.
///
/// Pairs of rows are packed together, eight columns of each in turn. Single rows would leave half of it unused.
#include "kernels/int8_matmul/tile.hpp"

namespace bnb::int8 {
namespace {

constexpr int pairs = tile_size / 2;

inline int8x16_t low_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

inline int8x16_t high_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

/// sums + x w^T, where all are matrices of two rows, one after the other.
inline int32x4_t multiply_pairs(int32x4_t sums, int8x16_t x, int8x16_t w) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vmmlaq_s32(sums, x, w);
#else  // emulated, or not built for this tier
    const int32x4_t zero = vdupq_n_s32(0);
    const int32x4_t first = vdotq_s32(zero, low_halves(x, x), w), second = vdotq_s32(zero, high_halves(x, x), w);
    return vaddq_s32(sums, vpaddq_s32(first, second));
#endif
}

void pack(Rows rows, int64_t K, int8_t *packed) {
    for (int64_t k = 0; k < K; k += columns_step) {
        for (int pair = 0; pair < pairs; ++pair, packed += 2 * columns_step) {
            const int8x16_t a = load_left(rows[2 * pair], K, k), b = load_left(rows[2 * pair + 1], K, k);
            vst1q_s8(packed, low_halves(a, b));
            vst1q_s8(packed + columns_step, high_halves(a, b));
        }
    }
}

void multiply(const int8_t *packed, Rows right, int64_t K, Sums sums) {
    int32x4_t sum[pairs][pairs];  // two rows on the left by two on the right
    for (auto &row : sum)
        for (int32x4_t &four : row) four = vdupq_n_s32(0);
    for_columns(K, [&](int64_t, int64_t column) BNB_INLINE {
        int8x16_t low[pairs], high[pairs];
        for (int j = 0; j < pairs; ++j) {
            const int8x16_t a = vld1q_s8(right[2 * j] + column), b = vld1q_s8(right[2 * j + 1] + column);
            low[j] = low_halves(a, b);
            high[j] = high_halves(a, b);
        }
        for (int i = 0; i < pairs; ++i, packed += 2 * columns_step) {
            const int8x16_t x_low = vld1q_s8(packed), x_high = vld1q_s8(packed + columns_step);
            for (int j = 0; j < pairs; ++j) sum[i][j] = multiply_pairs(sum[i][j], x_low, low[j]);
            for (int j = 0; j < pairs; ++j) sum[i][j] = multiply_pairs(sum[i][j], x_high, high[j]);
        }
    });
    for (int i = 0; i < pairs; ++i) {
        for (int j = 0; j < pairs; ++j) {
            vst1_s32(&sums[2 * i][2 * j], vget_low_s32(sum[i][j]));
            vst1_s32(&sums[2 * i + 1][2 * j], vget_high_s32(sum[i][j]));
        }
    }
}

}  // namespace

const Kernels i8mm = {4, pack, multiply, multiply_row_dotprod};

}  // namespace bnb::int8
