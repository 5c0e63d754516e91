/// Products with a quantized weight that is not transposed, the gradients of linear layers, by panels of the weight's columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elements.hpp"
#include "kernels/tiles.hpp"
#include "parallel.hpp"

namespace bnb {
namespace transposed {

/// Rows and columns of a panel of the weight.
constexpr int64_t panel_rows = 64, panel_columns = 64;
/// Columns that are computed at a time: with 4 rows, 16 registers of sums.
constexpr int64_t columns_at_once = 16;

/// Adds the products of 4 rows of g with a panel to 16 columns of `sums` [4][panel_columns]. The 4 elements of each column of g lie
/// `stride` after those of the one before.
inline void multiply_tile(const float *g, int64_t stride, const float *panel, int64_t rows, float *sums) {
    float32x4_t sum[4][4];
    for (int m = 0; m < 4; ++m)
        for (int v = 0; v < 4; ++v) sum[m][v] = vld1q_f32(sums + m * panel_columns + 4 * v);
    for (int64_t n = 0; n < rows; ++n, g += stride, panel += panel_columns) {
        const float32x4_t factors = vld1q_f32(g);
        for (int v = 0; v < 4; ++v) {
            const float32x4_t weights = vld1q_f32(panel + 4 * v);
            sum[0][v] = vfmaq_laneq_f32(sum[0][v], weights, factors, 0);
            sum[1][v] = vfmaq_laneq_f32(sum[1][v], weights, factors, 1);
            sum[2][v] = vfmaq_laneq_f32(sum[2][v], weights, factors, 2);
            sum[3][v] = vfmaq_laneq_f32(sum[3][v], weights, factors, 3);
        }
    }
    for (int m = 0; m < 4; ++m)
        for (int v = 0; v < 4; ++v) vst1q_f32(sums + m * panel_columns + 4 * v, sum[m][v]);
}

/// Multiplies rows of g, in tiles, by the columns of the weight from `first` on, at most `panel_columns` of them.
template <class T, class Dequantize>
void multiply_panel(const Tiles &g, const Dequantize &dequantize, int64_t first, int64_t K, T *y) {
    const int64_t columns = std::min(panel_columns, K - first), N = g.columns;
    float panel[panel_rows * panel_columns] = {};
    float sums[most_rows * panel_columns];
    std::fill(sums, sums + (g.rows + 3) / 4 * 4 * panel_columns, 0.0f);
    for (int64_t n = 0; n < N; n += panel_rows) {
        const int64_t rows = std::min(panel_rows, N - n);
        for (int64_t row = 0; row < rows; ++row) {
            dequantize(n + row, first, columns, panel + row * panel_columns);
        }
        for (int64_t m = 0; m < g.rows; m += 4) {
            const int64_t tile = m - m % tile_rows;
            const float *factors = g.at(tile, n) + m % tile_rows;
            for (int64_t k = 0; k < columns; k += columns_at_once) {
                multiply_tile(factors, 4 * g.vectors(tile), panel + k, rows, sums + m * panel_columns + k);
            }
        }
    }
    for (int64_t m = 0; m < g.rows; ++m) {
        const float *sum = sums + m * panel_columns;
        T *to = y + m * K + first;
        int64_t k = 0;
        for (; k + 4 <= columns; k += 4) store4(to + k, vld1q_f32(sum + k));
        for (; k < columns; ++k) store1(to + k, sum[k]);
    }
}

}  // namespace transposed

/// Fills y [M, K] with g [M, N] times a weight [N, K], of which `dequantize(row, column, count, out)` gives parts of rows in float32.
/// `scratch` has room for `tiles_size(M, N)` floats.
template <class Dequantize>
void multiply_transposed(
    DType dtype, const void *g, int64_t M, int64_t N, int64_t K, const Dequantize &dequantize, void *y, float *scratch, int threads) {
    const int64_t panels = (K + transposed::panel_columns - 1) / transposed::panel_columns;
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        for (int64_t m = 0; m < M; m += most_rows) {
            const Tiles tiles{scratch, std::min(most_rows, M - m), N};
            fill_tiles(tiles, static_cast<const T *>(g) + m * N, threads);
            const int64_t grain = std::max<int64_t>(1, (1 << 15) / (transposed::panel_columns * N));
            parallel_for(threads, panels, grain, [&](int64_t begin, int64_t end) {
                for (int64_t panel = begin; panel < end; ++panel) {
                    transposed::multiply_panel(tiles, dequantize, panel * transposed::panel_columns, K, static_cast<T *>(y) + m * K);
                }
            });
        }
    });
}

}  // namespace bnb
