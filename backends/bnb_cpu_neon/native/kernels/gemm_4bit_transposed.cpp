/// gemm_4bit_transposed: the gradient of a product, by panels of the weight's columns.
#include "kernels/gemm_4bit.hpp"
#include "kernels/tiles.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Rows and columns of a panel of the weight.
constexpr int64_t panel_rows = 64, panel_columns = 64;
/// Columns that are computed at a time: with 4 rows, 16 registers of sums.
constexpr int64_t columns_at_once = 16;

/// Adds the products of 4 rows of g with a panel to 16 columns of `sums` [4][panel_columns]. The 4 elements of each column of g lie
/// `stride` after those of the one before.
void multiply_tile(const float *g, int64_t stride, const float *panel, int64_t rows, float *sums) {
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
template <class T>
void multiply_panel(const Tiles &g, const Packed4bit &weight, const Codebook16 &codebook, int64_t first, int64_t K, T *y) {
    const int64_t columns = std::min(panel_columns, K - first), N = g.columns;
    float panel[panel_rows * panel_columns] = {};
    float sums[most_rows * panel_columns];
    std::fill(sums, sums + (g.rows + 3) / 4 * 4 * panel_columns, 0.0f);
    for (int64_t n = 0; n < N; n += panel_rows) {
        const int64_t rows = std::min(panel_rows, N - n);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t start = (n + row) * K + first;
            dequantize(weight, codebook, start, start + columns, panel + row * panel_columns);
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

}  // namespace

int64_t gemm_4bit_transposed_scratch(int64_t M, int64_t N) { return tiles_size(M, N); }

void gemm_4bit_transposed(
    DType dtype, const void *g, int64_t M, const Packed4bit &weight, int64_t N, int64_t K, void *y, float *scratch, int threads) {
    const Codebook16 codebook(weight.codebook);
    const int64_t panels = (K + panel_columns - 1) / panel_columns;
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        for (int64_t m = 0; m < M; m += most_rows) {
            const Tiles tiles{scratch, std::min(most_rows, M - m), N};
            fill_tiles(tiles, static_cast<const T *>(g) + m * N, threads);
            const int64_t grain = std::max<int64_t>(1, (1 << 15) / (panel_columns * N));
            parallel_for(threads, panels, grain, [&](int64_t begin, int64_t end) {
                for (int64_t panel = begin; panel < end; ++panel) {
                    multiply_panel(tiles, weight, codebook, panel * panel_columns, K, static_cast<T *>(y) + m * K);
                }
            });
        }
    });
}

}  // namespace bnb
