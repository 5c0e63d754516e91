/// int8_linear: rows are quantized and packed a megabyte at a time, multiplied, and the sums scaled while they are in cache.
#include <algorithm>
#include <array>

#include "kernels/int8.hpp"
#include "kernels/int8_codes.hpp"
#include "kernels/int8_matmul/product.hpp"
#include "kernels/int8_rows.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

using int8::most_rows;
using int8::tile_size;

/// The outlier columns of x, and what they add to the product.
class Outliers {
  public:
    /// Args: the numbers of the columns; memory for [rows at a time][columns] float32.
    Outliers(const int32_t *columns, int64_t count, float *values) : columns_(columns), count_(count), values_(values) {}

    bool any() const { return count_ > 0; }

    /// Collects the columns' values in a row of x.
    template <class T>
    void collect(const T *x, int64_t row) const {
        for (int64_t i = 0; i < count_; ++i) values_[row * count_ + i] = load1(x + columns_[i]);
    }

    /// Fills sums [rows from `begin` to `end`][8] with their products with the codes of `count` <= 8 rows of the weight.
    void multiply(int64_t begin, int64_t end, const int8_t *weight, int64_t K, int64_t count, float (*sums)[tile_size]) const {
        std::fill(&sums[0][0], &sums[end - begin][0], 0.0f);
        constexpr int64_t step = 64;
        float w[step][tile_size];
        for (int64_t first = 0; first < count_; first += step) {
            const int64_t columns = std::min(step, count_ - first);
            for (int64_t j = 0; j < tile_size; ++j) {
                const int8_t *row = weight + std::min(j, count - 1) * K;
                for (int64_t i = 0; i < columns; ++i) w[i][j] = row[columns_[first + i]];
            }
            for (int64_t m = begin; m < end; ++m) {
                const float *x = values_ + m * count_ + first;
                float *sum = sums[m - begin];
                float32x4_t low = vld1q_f32(sum), high = vld1q_f32(sum + 4);
                for (int64_t i = 0; i < columns; ++i) {
                    low = vfmaq_n_f32(low, vld1q_f32(w[i]), x[i]);
                    high = vfmaq_n_f32(high, vld1q_f32(w[i] + 4), x[i]);
                }
                vst1q_f32(sum, low);
                vst1q_f32(sum + 4, high);
            }
        }
    }

  private:
    const int32_t *columns_;
    int64_t count_;
    float *values_;
};

/// Where things are in the scratch memory, and how much there is of it.
struct Scratch {
    float *row_scales, *outlier_values;
    int32_t *outlier_columns;
    int8_t *codes, *packed;
    uint8_t *outlier_mask;
    int64_t bytes;

    Scratch(void *memory, int64_t M, int64_t K, bool outliers) {
        const int64_t rows = std::min(M, int8::rows_at_a_time(K));
        const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
        uintptr_t at = (start + alignof(float) - 1) / alignof(float) * alignof(float);
        const auto take = [&](auto *&pointer, int64_t count) {
            pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(at);
            at += static_cast<std::size_t>(count) * sizeof *pointer;
        };
        take(row_scales, rows);
        take(outlier_values, outliers ? rows * K : 0);
        take(outlier_columns, outliers ? K : 0);
        take(outlier_mask, outliers ? K : 0);
        take(codes, rows * K);
        take(packed, int8::Left::bytes(rows, K));
        bytes = static_cast<int64_t>(at - start + alignof(float) - 1);
    }
};

/// Four columns of the result: what their sums are scaled with, and what is added to them.
struct Columns {
    float32x4_t scale, outlier_scale, bias;

    /// Scales sums of products, with those of the outlier columns unless these are null. In this order, no intermediate result is far
    /// outside the range of the final ones.
    float32x4_t finish(const int32_t *sums, float row_scale, const float *outlier_sums) const {
        float32x4_t value = vmulq_f32(vmulq_n_f32(vcvtq_f32_s32(vld1q_s32(sums)), row_scale), scale);
        if (outlier_sums) value = vfmaq_f32(value, vld1q_f32(outlier_sums), outlier_scale);
        return vaddq_f32(value, bias);
    }
};

/// The columns of a tile; beyond `count` they mean nothing.
template <class T>
std::array<Columns, 2> columns_of_tile(const float *absmax, const T *bias, int64_t count) {
    float scale[tile_size] = {}, outlier_scale[tile_size] = {}, added[tile_size] = {};
    for (int64_t j = 0; j < count; ++j) {
        scale[j] = absmax[j];
        outlier_scale[j] = int8_row_scale(absmax[j]);
        if (bias) added[j] = load1(bias + j);
    }
    std::array<Columns, 2> columns;
    for (std::size_t half = 0; half < 2; ++half) {
        columns[half] = {vld1q_f32(scale + 4 * half), vld1q_f32(outlier_scale + 4 * half), vld1q_f32(added + 4 * half)};
    }
    return columns;
}

template <class T>
void multiply(const T *x, int64_t M, const Int8Weight &weight, const T *bias, double threshold, T *y, void *memory, int threads) {
    const int64_t N = weight.rows, K = weight.columns;
    const OutlierTest test(threshold);
    const Scratch scratch(memory, M, K, test.any());
    int64_t outlier_count = 0;
    if (test.any()) {
        const int64_t grain = std::max<int64_t>(1, (1 << 15) / M) * int8_step;
        parallel_for(threads, K, grain, [&](int64_t begin, int64_t end) {
            int8_find_outliers(x, M, K, test, begin, end, scratch.outlier_mask);
        });
        for (int64_t k = 0; k < K; ++k) {
            scratch.outlier_columns[outlier_count] = static_cast<int32_t>(k);
            outlier_count += scratch.outlier_mask[k];
        }
    }
    const Outliers outliers(scratch.outlier_columns, outlier_count, scratch.outlier_values);

    const int64_t step = int8::rows_at_a_time(K);
    for (int64_t first = 0; first < M; first += step) {
        const int64_t rows = std::min(step, M - first);
        const T *x_rows = x + first * K;
        T *y_rows = y + first * N;
        const int8::Left left(scratch.codes, rows, K, scratch.packed, int8::kernels(false));
        parallel_for(threads, left.tiles(), std::max<int64_t>(1, (1 << 15) / (tile_size * K)), [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile) {
                for (int64_t m = tile * tile_size; m < std::min((tile + 1) * tile_size, rows); ++m) {
                    const float absmax = int8_quantize_row(x_rows + m * K, K, test, scratch.outlier_mask, scratch.codes + m * K);
                    scratch.row_scales[m] = absmax * (1.0f / (127 * 127));
                    outliers.collect(x_rows + m * K, m);
                }
                left.pack(tile);
            }
        });
        parallel_for(threads, N, int8::grain_of_rows(rows, K), [&](int64_t from, int64_t to) {
            const auto use = [&](int64_t begin, int64_t end, int64_t n, int64_t count, const int32_t(*sums)[tile_size]) {
                const std::array<Columns, 2> columns = columns_of_tile(weight.absmax + n, bias ? bias + n : nullptr, count);
                const Columns left_half = columns[0], right_half = columns[1];
                const float *row_scale = scratch.row_scales + begin;
                T *out = y_rows + begin * N + n;
                if (!outliers.any() && count == tile_size) {
                    for (int64_t m = 0; m < end - begin; ++m, out += N) {
                        store4(out, left_half.finish(sums[m], row_scale[m], nullptr));
                        store4(out + 4, right_half.finish(sums[m] + 4, row_scale[m], nullptr));
                    }
                    return;
                }
                float outlier_sums[most_rows][tile_size];
                if (outliers.any()) outliers.multiply(begin, end, weight.codes + n * K, K, count, outlier_sums);
                for (int64_t m = 0; m < end - begin; ++m, out += N) {
                    T row[tile_size];
                    const float *added = outliers.any() ? outlier_sums[m] : nullptr;
                    store4(row, left_half.finish(sums[m], row_scale[m], added));
                    store4(row + 4, right_half.finish(sums[m] + 4, row_scale[m], added ? added + 4 : nullptr));
                    std::copy(row, row + count, out);
                }
            };
            int8::for_products(left, rows, weight.codes, K, from, to, use);
        });
    }
}

}  // namespace

int64_t int8_linear_scratch(int64_t M, int64_t K, double threshold) { return Scratch(nullptr, M, K, threshold > 0).bytes; }

void int8_linear(
    const Matrix &x, const Int8Weight &weight, const void *bias, double threshold, void *y, void *scratch, int threads) {
    with_type(x.dtype, [&](auto element) {
        using T = decltype(element);
        multiply(
            static_cast<const T *>(x.values), x.rows, weight, static_cast<const T *>(bias), threshold, static_cast<T *>(y), scratch,
            threads);
    });
}

}  // namespace bnb
