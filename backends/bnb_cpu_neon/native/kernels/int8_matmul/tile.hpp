/// The inner loops of int8 products, which each tier has its own of.
///
/// A tile is the product of 8 rows of the left matrix and 8 of the right one, along 16 columns at a time. The left rows are packed
/// in the order in which the tier's instructions take them; the right ones, which are a weight and as large as memory, are read
/// where they lie. What K leaves over is the last 16 columns once more, with those that were counted before set to zero on the
/// left: so K must be at least 16, and nothing is read beyond a row.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace bnb::int8 {

constexpr int tile_size = 8;
constexpr int64_t columns_step = 16;

/// Bytes of a row when it is packed.
constexpr int64_t packed_columns(int64_t K) { return (K + columns_step - 1) / columns_step * columns_step; }

/// Eight rows of the right matrix.
using Rows = const int8_t *const[tile_size];
/// A tile's sums: [row on the left][row on the right].
using Sums = int32_t[tile_size][tile_size];

/// Packs 8 rows on the left, each of K columns; `packed` has room for 8 * packed_columns(K) bytes.
using Pack = void(Rows rows, int64_t K, int8_t *packed);
/// Fills `sums` with the products of 8 packed rows and 8 rows on the right.
using Multiply = void(const int8_t *packed, Rows right, int64_t K, Sums sums);
/// Fills `sums` with the products of one row on the left, not packed, and 8 rows on the right.
using MultiplyRow = void(const int8_t *left, Rows right, int64_t K, int32_t *sums);

struct Kernels {
    int tile_from;  ///< rows from which on a tile, though not full, takes less time than row after row
    Pack *pack;
    Multiply *multiply;
    MultiplyRow *multiply_row;
};

/// The kernels of each tier. Those of the baseline come twice: a sum of two products fits 16 bits if no code on the left is -128.
extern const Kernels baseline, baseline_full_range, dotprod, i8mm;

/// Serves two tiers.
MultiplyRow multiply_row_dotprod;

/// 16 columns of a row on the left from column k on; `k` beyond the last step means what K leaves over.
inline int8x16_t load_left(const int8_t *row, int64_t K, int64_t k) {
    if (k + columns_step <= K) return vld1q_s8(row + k);
    static const int8_t mask[2 * columns_step] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                                  -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    return vandq_s8(vld1q_s8(row + K - columns_step), vld1q_s8(mask + (K - k)));
}

/// Calls `step(k, column)` for each 16 packed columns from k on, which are those from `column` on in the rows on the right.
template <class Step>
BNB_INLINE inline void for_columns(int64_t K, const Step &step) {
    int64_t k = 0;
    for (; k + 2 * columns_step <= K; k += 2 * columns_step) {
        step(k, k);
        step(k + columns_step, k + columns_step);
    }
    if (k + columns_step <= K) {
        step(k, k);
        k += columns_step;
    }
    if (k < K) step(k, K - columns_step);
}

}  // namespace bnb::int8
