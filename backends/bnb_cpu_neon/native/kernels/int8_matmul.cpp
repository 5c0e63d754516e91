/// int8_matmul, and the walk over tiles that it shares with int8_linear.
#include <cstring>

#include "kernels/int8.hpp"
#include "kernels/int8_matmul/product.hpp"
#include "parallel.hpp"
#include "tier.hpp"

namespace bnb {
namespace int8 {

const Kernels &kernels(bool full_range) {
    switch (current_tier()) {
        case Tier::i8mm:
            return i8mm;
        case Tier::dotprod:
            return dotprod;
        default:
            return full_range ? baseline_full_range : baseline;
    }
}

Left::Left(const int8_t *codes, int64_t M, int64_t K, int8_t *packed, const Kernels &kernels)
    : codes_(codes), M_(M), K_(K), packed_(packed), kernels_(kernels) {}

void Left::pack(int64_t tile) const {
    if (!is_packed(tile)) return;
    const int8_t *rows[tile_size];
    for (int64_t i = 0; i < tile_size; ++i) rows[i] = codes_ + std::min(tile * tile_size + i, M_ - 1) * K_;
    kernels_.pack(rows, K_, packed_ + tile * tile_size * packed_columns(K_));
}

void Left::multiply(int64_t begin, int64_t end, const int8_t *right, int64_t count, int32_t (*sums)[tile_size]) const {
    const int8_t *rows[tile_size];
    for (int64_t j = 0; j < tile_size; ++j) rows[j] = right + std::min(j, count - 1) * K_;
    for (int64_t m = begin; m < end; m += tile_size, sums += tile_size) {
        const int64_t tile = m / tile_size;
        if (is_packed(tile)) {
            kernels_.multiply(packed_ + tile * tile_size * packed_columns(K_), rows, K_, sums);
            continue;
        }
        for (int64_t i = 0; i < std::min<int64_t>(tile_size, end - m); ++i) {
            const int8_t *row = codes_ + (m + i) * K_;
            if (K_ >= columns_step) {
                kernels_.multiply_row(row, rows, K_, sums[i]);
                continue;
            }
            for (int j = 0; j < tile_size; ++j) {
                sums[i][j] = 0;
                for (int64_t k = 0; k < K_; ++k) sums[i][j] += row[k] * rows[j][k];
            }
        }
    }
}

}  // namespace int8

int64_t int8_matmul_scratch(int64_t M, int64_t K) { return int8::Left::bytes(std::min(M, int8::rows_at_a_time(K)), K); }

void int8_matmul(const int8_t *a, const int8_t *b, int64_t M, int64_t N, int64_t K, int32_t *product, void *scratch, int threads) {
    const int64_t step = int8::rows_at_a_time(K);
    for (int64_t first = 0; first < M; first += step) {
        const int64_t rows = std::min(step, M - first);
        const int8::Left left(a + first * K, rows, K, static_cast<int8_t *>(scratch), int8::kernels(true));
        parallel_for(threads, left.tiles(), std::max<int64_t>(1, (1 << 17) / (int8::tile_size * K)), [&](int64_t from, int64_t to) {
            for (int64_t tile = from; tile < to; ++tile) left.pack(tile);
        });
        int32_t *out = product + first * N;
        parallel_for(threads, N, int8::grain_of_rows(rows, K), [&](int64_t from, int64_t to) {
            const auto copy = [&](int64_t begin, int64_t end, int64_t n, int64_t count, const int32_t(*sums)[int8::tile_size]) {
                for (int64_t m = begin; m < end; ++m) {
                    std::memcpy(out + m * N + n, sums[m - begin], static_cast<std::size_t>(count) * sizeof(int32_t));
                }
            };
            int8::for_products(left, rows, b, K, from, to, copy);
        });
    }
}

}  // namespace bnb
