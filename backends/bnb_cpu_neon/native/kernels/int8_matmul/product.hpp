/// Products of int8 matrices, tile by tile, for whoever knows what to do with the sums.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/int8_matmul/tile.hpp"

namespace bnb::int8 {

/// Rows on the left whose sums are handed over together.
constexpr int64_t most_rows = 64;

/// Rows on the left that are packed at a time: about a megabyte.
inline int64_t rows_at_a_time(int64_t K) { return std::max<int64_t>(1, (1 << 20) / (most_rows * packed_columns(K))) * most_rows; }

/// What the kernels of this CPU's best tier are; `full_range` if codes on the left may be -128.
const Kernels &kernels(bool full_range);

/// The left matrix of a product, at most `rows_at_a_time` rows of it.
class Left {
  public:
    /// Bytes that a matrix takes packed.
    static int64_t bytes(int64_t M, int64_t K) { return (M + tile_size - 1) / tile_size * tile_size * packed_columns(K); }

    /// Args: the matrix [M, K], and memory for it to be packed in.
    Left(const int8_t *codes, int64_t M, int64_t K, int8_t *packed, const Kernels &kernels);

    int64_t tiles() const { return (M_ + tile_size - 1) / tile_size; }
    /// Packs tile number `tile`, unless its rows are so few that they are multiplied one by one. Their codes must be there.
    void pack(int64_t tile) const;

    /// Fills sums [rows on the left, from `begin` to `end`][8] with the products of these and `count` <= 8 rows on the right. The
    /// first row is a tile's first; sums beyond `count` mean nothing, and neither do those of rows that fill the last tile.
    void multiply(int64_t begin, int64_t end, const int8_t *right, int64_t count, int32_t (*sums)[tile_size]) const;

  private:
    bool is_packed(int64_t tile) const { return K_ >= columns_step && M_ - tile * tile_size >= kernels_.tile_from; }

    const int8_t *codes_;
    int64_t M_, K_;
    int8_t *packed_;
    const Kernels &kernels_;
};

/// Calls `use(begin, end, n, count, sums)` for all products of rows [begin, end) on the left with rows n to n + count on the right,
/// which are in [first, last).
template <class Use>
inline void for_products(const Left &left, int64_t M, const int8_t *right, int64_t K, int64_t first, int64_t last, const Use &use) {
    int32_t sums[most_rows][tile_size];
    for (int64_t begin = 0; begin < M; begin += most_rows) {
        const int64_t end = std::min(begin + most_rows, M);
        for (int64_t n = first; n < last; n += tile_size) {
            const int64_t count = std::min<int64_t>(tile_size, last - n);
            left.multiply(begin, end, right + n * K, count, sums);
            use(begin, end, n, count, sums);
        }
    }
}

/// Rows on the right that a thread should have at least, in whole tiles.
inline int64_t grain_of_rows(int64_t M, int64_t K) {
    constexpr int64_t products = 1 << 20;  // below which a second thread costs more than it saves
    return (products / std::max<int64_t>(1, M * K * tile_size) + 1) * tile_size;
}

}  // namespace bnb::int8
