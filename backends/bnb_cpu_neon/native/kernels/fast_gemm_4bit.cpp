/// fast_gemm_4bit: blocks of x in int8, each with a scale of its own, by weights in int8.
///
/// The sum of the products of two blocks is an exact integer, and it is scaled and added in the same way in every tier and for any
/// number of rows of x. A few rows are multiplied one by one, by codes as they are packed; for more, panels of the weight are
/// unpacked into the nearest cache, and multiplied by tiles of x like any int8 matrices. That takes a CPU with dot products: by
/// baseline instructions, many rows in float32 are as fast, and exact.
#include "kernels/fast_gemm_4bit/dot_rows.hpp"
#include "kernels/gemm_4bit.hpp"
#include "kernels/int8_codes.hpp"
#include "kernels/int8_matmul/product.hpp"
#include "kernels/tiles.hpp"
#include "parallel.hpp"
#include "tier.hpp"

namespace bnb {
namespace {

using fast::rows_at_once;
using fast::step;
using int8::tile_size;
static_assert(rows_at_once == tile_size, "rows of the weight are shared out by as many, however x is multiplied by them");

/// Weights below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 16;

constexpr TierTable<fast::DotRows> dot_rows = {fast::dot_rows_baseline, fast::dot_rows_dotprod, fast::dot_rows_dotprod};

/// A codebook in int8.
struct Table {
    int8x16_t codes;
    float unit;  ///< what a product of codes is worth, times the absmax of x's block and the scale of the weight's

    explicit Table(const float *codebook) {
        const float absmax = largest_magnitude(codebook, 16);
        codes = int8_codes(codebook, int8_scale(absmax));
        unit = int8_floored(absmax) * (1.0f / (127 * 127));
    }
};

/// Rows of x in int8: at most `most_rows`. It takes less memory than they would in float32.
struct Rows {
    int64_t count, columns, blocksize, blocks;
    int64_t tiled;  ///< of them, how many are packed in tiles; the others are multiplied one by one
    float *scales;   ///< [count][blocks]
    int8_t *codes;   ///< [count][columns], in the order of `fast::Blocks`
    int8_t *packed;  ///< tiles of 8 rows, each block by block

    Rows(float *scratch, int64_t count, int64_t columns, int64_t blocksize)
        : count(count), columns(columns), blocksize(blocksize), blocks(columns / blocksize), scales(scratch) {
        const int64_t rest = count % tile_size;
        tiled = rest < int8::kernels(false).tile_from ? count - rest : count;
        codes = reinterpret_cast<int8_t *>(scales + count * blocks);
        packed = codes + count * columns;
    }

    int64_t tiles() const { return (tiled + tile_size - 1) / tile_size; }
    int8_t *tile(int64_t number, int64_t block) const { return packed + (number * columns + block * blocksize) * tile_size; }

    template <class T>
    void quantize(const T *x, int64_t row, float unit) const {
        int8_t *to = codes + row * columns;
        for (int64_t block = 0; block < blocks; ++block, x += blocksize) {
            const float absmax = largest_magnitude(x, blocksize), scale = int8_scale(absmax);
            scales[row * blocks + block] = int8_floored(absmax) * unit;
            for (int64_t k = 0; k < blocksize; k += step, to += step) {
                const int8x16_t first = int8_codes(x + k, scale), second = int8_codes(x + k + step / 2, scale);
                vst1q_s8(to, vuzp1q_s8(first, second));
                vst1q_s8(to + step / 2, vuzp2q_s8(first, second));
            }
        }
    }

    void pack(int64_t number) const {
        for (int64_t block = 0; block < blocks; ++block) {
            const int8_t *rows[tile_size];
            for (int64_t i = 0; i < tile_size; ++i) {
                rows[i] = codes + std::min(number * tile_size + i, count - 1) * columns + block * blocksize;
            }
            int8::kernels(false).pack(rows, blocksize, tile(number, block));
        }
    }
};

template <class T>
void store(const float *products, int64_t count, const T *bias, T *y) {
    for (; count >= 4; count -= 4, products += 4, y += 4) {
        store4(y, bias ? vaddq_f32(vld1q_f32(products), load4(bias)) : vld1q_f32(products));
        if (bias) bias += 4;
    }
    for (int64_t i = 0; i < count; ++i) store1(y + i, bias ? products[i] + load1(bias + i) : products[i]);
}

// ------------------------------------------------------------------------------------------------------------- rows one by one

/// Fills `products` with those of the scales of x with those of rows of the weight, which begin at these numbers of blocks.
void multiply_scales(
    const BlockScales weight, const int64_t (&first)[rows_at_once], const float *x, int64_t count, fast::Scales &products) {
    constexpr int half_rows = rows_at_once / 2;
    for (int half = 0; half < 2; ++half) {
        const int64_t *numbers = first + half * half_rows;
        int64_t block = 0;
        if (!weight.nested.absmax) {
            const float *rows[half_rows];
            for (int row = 0; row < half_rows; ++row) rows[row] = static_cast<const float *>(weight.absmax) + numbers[row];
            for (; block + 4 <= count; block += 4) {
                const float32x4_t factors = vld1q_f32(x + block);
                float32x4x4_t four;
                unroll<half_rows>([&](auto row) BNB_INLINE { four.val[row] = vmulq_f32(vld1q_f32(rows[row] + block), factors); });
                vst4q_f32(products[half][block], four);
            }
        }
        for (; block < count; ++block)
            for (int row = 0; row < half_rows; ++row) products[half][block][row] = weight[numbers[row] + block] * x[block];
    }
}

/// Multiplies row number m of x by the rows of the weight from n on, at most 8 of them.
template <class T>
__attribute__((noinline)) void multiply_row(
    const Rows &x, int64_t m, const Packed4bit &weight, const Table &table, int64_t n, int64_t N, const T *bias, T *y) {
    const int8_t *codes = x.codes + m * x.columns;
    const float *x_scales = x.scales + m * x.blocks;
    int64_t first[rows_at_once];
    const uint8_t *packed[rows_at_once];
    for (int64_t i = 0; i < rows_at_once; ++i) {
        const int64_t row = std::min(n + i, N - 1);
        first[i] = row * x.blocks;
        packed[i] = weight.codes + row * (x.columns / 2);
    }
    float sums[rows_at_once] = {};
    fast::Scales scales;
    for (int64_t block = 0; block < x.blocks; block += fast::most_blocks) {
        const int64_t count = std::min(fast::most_blocks, x.blocks - block);
        multiply_scales(weight.scales, first, x_scales + block, count, scales);
        best(dot_rows)({codes, count, x.blocksize}, packed, table.codes, scales, sums);
        codes += count * x.blocksize;
        for (int64_t i = 0; i < rows_at_once; ++i) {
            first[i] += count;
            packed[i] += count * (x.blocksize / 2);
        }
    }
    store(sums, std::min<int64_t>(rows_at_once, N - n), bias ? bias + n : nullptr, y + m * N + n);
}

// ---------------------------------------------------------------------------------------------------------------- rows in tiles

/// Columns of a panel of the weight, unless a block is longer.
constexpr int64_t panel_columns = 1024;
constexpr int64_t longest_block = 4096;

/// The rows of the weight from `first` on, at most 8 of them, and some of their blocks.
struct Panel {
    int64_t columns;
    int8_t codes[tile_size * longest_block];
    float scales[panel_columns / step][tile_size];

    void fill(const Packed4bit &weight, int8x16_t table, int64_t first, int64_t N, int64_t K, int64_t column, int64_t count) {
        const int64_t blocksize = weight.scales.blocksize;
        for (int64_t j = 0; j < tile_size; ++j) {
            const int64_t start = std::min(first + j, N - 1) * K + column;
            const uint8_t *packed = weight.codes + start / 2;
            int8_t *to = codes + j * columns;
            for (int64_t k = 0; k < count; k += step, packed += step / 2, to += step) {
                const uint8x16_t pairs = vld1q_u8(packed);
                vst1q_s8(to, vqtbl1q_s8(table, vshrq_n_u8(pairs, 4)));
                vst1q_s8(to + step / 2, vqtbl1q_s8(table, vandq_u8(pairs, vdupq_n_u8(15))));
            }
            for (int64_t block = 0; block < count / blocksize; ++block) scales[block][j] = weight.scales[start / blocksize + block];
        }
    }
};

/// Adds `products` of a tile, of which `rows` are wanted, to `sums`: scaled by rows of x, whose scales are `stride` apart, and of the weight.
void add_scaled(
    const int32_t (*products)[tile_size], int64_t rows, const float *x_scales, int64_t stride, const float *scales,
    float (*sums)[tile_size]) {
    const float32x4_t low = vld1q_f32(scales), high = vld1q_f32(scales + 4);
    for (int64_t i = 0; i < rows; ++i) {
        const float scale = x_scales[i * stride];
        vst1q_f32(sums[i], vfmaq_f32(vld1q_f32(sums[i]), vcvtq_f32_s32(vld1q_s32(products[i])), vmulq_n_f32(low, scale)));
        vst1q_f32(sums[i] + 4, vfmaq_f32(vld1q_f32(sums[i] + 4), vcvtq_f32_s32(vld1q_s32(products[i] + 4)), vmulq_n_f32(high, scale)));
    }
}

/// Multiplies the tiles of x by the rows of the weight from `first` on, at most 8 of them.
template <class T>
__attribute__((noinline)) void multiply_panel(
    const Rows &x, const Packed4bit &weight, const Table &table, int64_t first, int64_t N, const T *bias, T *y) {
    const int64_t K = x.columns, blocksize = x.blocksize, blocks = x.blocks;
    const int8::Kernels &kernels = int8::kernels(false);
    float sums[most_rows][tile_size] = {};
    Panel panel;
    panel.columns = std::max(panel_columns, blocksize);
    for (int64_t column = 0; column < K; column += panel.columns) {
        const int64_t count = std::min(panel.columns, K - column);
        panel.fill(weight, table.codes, first, N, K, column, count);
        for (int64_t at = 0; at < count; at += blocksize) {
            const int8_t *rows[tile_size];
            for (int64_t j = 0; j < tile_size; ++j) rows[j] = panel.codes + j * panel.columns + at;
            const int64_t block = (column + at) / blocksize;
            for (int64_t m = 0; m < x.tiled; m += tile_size) {
                int32_t products[tile_size][tile_size];
                kernels.multiply(x.tile(m / tile_size, block), rows, blocksize, products);
                const float *x_scales = x.scales + m * blocks + block;
                add_scaled(products, std::min<int64_t>(tile_size, x.tiled - m), x_scales, blocks, panel.scales[at / blocksize], sums + m);
            }
        }
    }
    for (int64_t m = 0; m < x.tiled; ++m) store(sums[m], std::min<int64_t>(tile_size, N - first), bias ? bias + first : nullptr, y + m * N + first);
}

// ------------------------------------------------------------------------------------------------------------------- all of them

template <class T>
void multiply(const T *x, const Rows &rows, const Packed4bit &weight, int64_t N, const T *bias, T *y, int threads) {
    const int64_t K = rows.columns;
    const Table table(weight.codebook);
    const int64_t groups = (rows.count + tile_size - 1) / tile_size;
    parallel_for(threads, groups, std::max<int64_t>(1, grain / (tile_size * K)), [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            for (int64_t m = group * tile_size; m < std::min((group + 1) * tile_size, rows.count); ++m) rows.quantize(x + m * K, m, table.unit);
            if (group < rows.tiles()) rows.pack(group);
        }
    });
    const int64_t panels = (N + tile_size - 1) / tile_size;
    parallel_for(threads, panels, std::max<int64_t>(1, grain / (tile_size * K)), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * tile_size; n < std::min(end * tile_size, N); n += tile_size) {
            if (rows.tiled) multiply_panel(rows, weight, table, n, N, bias, y);
            for (int64_t m = rows.tiled; m < rows.count; ++m) multiply_row(rows, m, weight, table, n, N, bias, y);
        }
    });
}

}  // namespace

void fast_gemm_4bit(
    DType dtype, const void *x, int64_t M, const Packed4bit &weight, int64_t N, int64_t K, const void *bias, void *y, float *scratch,
    int threads) {
    if (current_tier() == Tier::baseline && M >= int8::baseline.tile_from) {
        return gemm_4bit(dtype, x, M, weight, N, K, bias, y, scratch, threads);
    }
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        for (int64_t m = 0; m < M; m += most_rows) {
            const Rows rows(scratch, std::min(most_rows, M - m), K, weight.scales.blocksize);
            multiply(static_cast<const T *>(x) + m * K, rows, weight, N, static_cast<const T *>(bias), static_cast<T *>(y) + m * N, threads);
        }
    });
}

}  // namespace bnb
