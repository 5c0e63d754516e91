/// int8_quantize_rows and int8_quantize_rows_cols.
#include <algorithm>

#include "kernels/int8.hpp"
#include "kernels/int8_codes.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

int64_t grain_of(int64_t elements_each) { return std::max<int64_t>(1, grain / elements_each); }

/// Fills what concerns single columns, [begin, end): absmax and codes.
template <class T>
void quantize_columns(
    const T *x, int64_t M, int64_t K, const OutlierTest &outliers, int64_t begin, int64_t end, int8_t *codes, float *absmax) {
    for (int64_t k = begin; k < end; k += 4) {
        // Columns beyond the end are read as zeros.
        const int64_t count = std::min<int64_t>(4, end - k);
        const auto load = [&](int64_t m) {
            if (count == 4) return load4(x + m * K + k);
            T rest[4] = {};
            std::copy(x + m * K + k, x + m * K + end, rest);
            return load4(rest);
        };
        uint32x4_t largest = vdupq_n_u32(0);
        for (int64_t m = 0; m < M; ++m) largest = vmaxq_u32(largest, outliers.regular(load(m)));
        float maxima[4], scales[4];
        vst1q_f32(maxima, vreinterpretq_f32_u32(largest));
        for (int i = 0; i < 4; ++i) scales[i] = int8_scale(maxima[i]);
        std::copy(maxima, maxima + count, absmax + k);
        const float32x4_t scale = vld1q_f32(scales);
        for (int64_t m = 0; m < M; ++m) {
            const float32x4_t values = load(m);
            const int32x4_t found = vbicq_s32(nearest_integers(vmulq_f32(values, scale)), vreinterpretq_s32_u32(outliers.reached(values)));
            int32_t lanes[4];
            vst1q_s32(lanes, found);
            for (int64_t i = 0; i < count; ++i) codes[m * K + k + i] = static_cast<int8_t>(lanes[i]);
        }
    }
}

}  // namespace

void int8_quantize_rows(const Matrix &x, double threshold, int8_t *codes, float *absmax, uint8_t *outlier_mask, int threads) {
    const int64_t M = x.rows, K = x.columns;
    const OutlierTest outliers(threshold);
    with_type(x.dtype, [&](auto element) {
        const auto *values = static_cast<const decltype(element) *>(x.values);
        parallel_for(threads, K, std::max<int64_t>(int8_step, grain_of(M) / int8_step * int8_step), [&](int64_t begin, int64_t end) {
            int8_find_outliers(values, M, K, outliers, begin, end, outlier_mask);
        });
        parallel_for(threads, M, grain_of(K), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) {
                absmax[m] = int8_quantize_row(values + m * K, K, outliers, outlier_mask, codes + m * K);
            }
        });
    });
}

void int8_quantize_rows_cols(
    const Matrix &x, double threshold, int8_t *row_codes, float *row_absmax, int8_t *col_codes, float *col_absmax, uint8_t *outlier_mask,
    int threads) {
    int8_quantize_rows(x, threshold, row_codes, row_absmax, outlier_mask, threads);
    const OutlierTest outliers(threshold);
    with_type(x.dtype, [&](auto element) {
        const auto *values = static_cast<const decltype(element) *>(x.values);
        parallel_for(threads, x.columns, std::max<int64_t>(4, grain_of(x.rows) / 4 * 4), [&](int64_t begin, int64_t end) {
            quantize_columns(values, x.rows, x.columns, outliers, begin, end, col_codes, col_absmax);
        });
    });
}

}  // namespace bnb
