/// Rows of a matrix in float32, in tiles: the elements of a column lie side by side, so that one load takes several rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elements.hpp"
#include "parallel.hpp"

namespace bnb {

/// Rows of a tile, at most; a matrix's last tile has as many vectors of 4 rows as it needs.
constexpr int64_t tile_rows = 16;
/// Rows that are put into tiles at a time, so that they take little memory.
constexpr int64_t most_rows = 256;

/// Floats that M rows take, or as many of them as are worked on at a time.
inline int64_t tiles_size(int64_t M, int64_t columns) { return (std::min(M, most_rows) + 3) / 4 * 4 * columns; }

struct Tiles {
    float *memory;
    int64_t rows, columns;

    /// Vectors of 4 rows in the tile that begins at row m.
    int vectors(int64_t m) const { return static_cast<int>((std::min(tile_rows, rows - m) + 3) / 4); }

    /// The first element of a column of the tile that begins at row m.
    float *at(int64_t m, int64_t column) const { return memory + m * columns + column * 4 * vectors(m); }
};

/// The columns of four rows of four.
inline float32x4x4_t transpose(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) {
    const float32x4_t ac0 = vzip1q_f32(a, c), ac1 = vzip2q_f32(a, c), bd0 = vzip1q_f32(b, d), bd1 = vzip2q_f32(b, d);
    return {{vzip1q_f32(ac0, bd0), vzip2q_f32(ac0, bd0), vzip1q_f32(ac1, bd1), vzip2q_f32(ac1, bd1)}};
}

/// Fills the tiles with rows of x; rows that are missing in the last one are zeros.
template <class T>
void fill_tiles(const Tiles &tiles, const T *x, int threads) {
    const int64_t columns = tiles.columns, fours = (tiles.rows + 3) / 4;
    parallel_for(threads, fours, std::max<int64_t>(1, (1 << 13) / columns), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin * 4; m < end * 4; m += 4) {
            const int64_t tile = m - m % tile_rows, stride = 4 * tiles.vectors(tile), rows = std::min<int64_t>(4, tiles.rows - m);
            float *to = tiles.at(tile, 0) + m % tile_rows;
            int64_t k = 0;
            for (; rows == 4 && k + 4 <= columns; k += 4) {
                const T *from = x + m * columns + k;
                const float32x4x4_t four =
                    transpose(load4(from), load4(from + columns), load4(from + 2 * columns), load4(from + 3 * columns));
                unroll<4>([&](auto i) BNB_INLINE { vst1q_f32(to + (k + i) * stride, four.val[i]); });
            }
            for (; k < columns; ++k) {
                for (int64_t row = 0; row < 4; ++row) to[k * stride + row] = row < rows ? load1(x + (m + row) * columns + k) : 0.0f;
            }
        }
    });
}

}  // namespace bnb
