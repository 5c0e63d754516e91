/// int8_matmul_dequant and int8_dequantize_rows: bound by memory on every core, so that one form serves all tiers.
#include <algorithm>

#include "kernels/int8.hpp"
#include "kernels/int8_rows.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

int64_t grain_of_rows(int64_t columns) { return std::max<int64_t>(1, grain / columns); }

template <class T>
void scale_row(const int32_t *product, float row_scale, const float *col_absmax, const T *bias, int64_t N, T *y) {
    int64_t n = 0;
    // In this order, no intermediate result is far outside the range of the final ones.
    for (; n + 4 <= N; n += 4) {
        const float32x4_t scaled = vmulq_f32(vmulq_n_f32(vcvtq_f32_s32(vld1q_s32(product + n)), row_scale), vld1q_f32(col_absmax + n));
        store4(y + n, bias ? vaddq_f32(scaled, load4(bias + n)) : scaled);
    }
    for (; n < N; ++n) {
        const float scaled = static_cast<float>(product[n]) * row_scale * col_absmax[n];
        store1(y + n, bias ? scaled + load1(bias + n) : scaled);
    }
}

}  // namespace

void int8_matmul_dequant(
    const int32_t *product, const float *row_absmax, const float *col_absmax, const void *bias, int64_t M, int64_t N, DType dtype, void *y,
    int threads) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        parallel_for(threads, M, grain_of_rows(N), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) {
                const float scale = row_absmax[m] * (1.0f / (127 * 127));
                scale_row(product + m * N, scale, col_absmax, static_cast<const T *>(bias), N, static_cast<T *>(y) + m * N);
            }
        });
    });
}

void int8_dequantize_rows(const int8_t *codes, const float *absmax, int64_t M, int64_t K, DType dtype, void *x, int threads) {
    with_type(dtype, [&](auto element) {
        auto *values = static_cast<decltype(element) *>(x);
        parallel_for(threads, M, grain_of_rows(K), [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) dequantize_int8_row(codes + m * K, int8_row_scale(absmax[m]), K, values + m * K);
        });
    });
}

}  // namespace bnb
