/// gemm_4bit: float32 arithmetic on every core, so that one form serves all tiers.
///
/// One row of x: dot products, each weight used in the register that it was looked up into. Several rows: panels of the weight
/// are dequantized into the nearest cache, and multiplied by tiles of x, which are kept with their columns next to each other.
#include "kernels/gemm_4bit.hpp"

#include "kernels/tiles.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Weights below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

// ------------------------------------------------------------------------------------------------------------- one row of x

/// Rows of the weight that share what is loaded of x.
constexpr int64_t rows_at_once = 4;

/// The K values of x in float32.
template <class T>
const float *to_floats(const T *x, int64_t K, float *scratch) {
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) vst1q_f32(scratch + k, load4(x + k));
    for (; k < K; ++k) scratch[k] = load1(x + k);
    return scratch;
}

/// The same in the order that codes are unpacked in: of each `packed_step`, those at even places and then those at odd ones.
template <class T>
const float *split_pairs(const T *x, int64_t K, float *scratch) {
    for (int64_t k = 0; k < K; k += 8) {
        const float32x4_t low = load4(x + k), high = load4(x + k + 4);
        float *even = scratch + k - k % packed_step / 2;
        vst1q_f32(even, vuzp1q_f32(low, high));
        vst1q_f32(even + packed_step / 2, vuzp2q_f32(low, high));
    }
    return scratch;
}

/// Adds the products of 16 weights of one block to four sums.
BNB_INLINE inline void dot_half_step(
    uint8x16_t codes, const Codebook16 &codebook, float scale, const float32x4_t (&x)[4], float32x4_t &sums) {
    const float32x4x4_t values = codebook[codes];
    unroll<4>([&](auto i) BNB_INLINE { sums = vfmaq_f32(sums, vmulq_n_f32(values.val[i], scale), x[i]); });
}

/// Adds the products of `packed_step` weights of one block to four sums; x in its own order.
BNB_INLINE inline void dot_step(
    const uint8_t *packed, const Codebook16 &codebook, float scale, const float *x, float32x4_t &sums) {
    const uint8x16x2_t codes = unpack(packed);
    unroll<2>([&](auto half) BNB_INLINE {
        float32x4_t vectors[4];
        unroll<4>([&](auto i) BNB_INLINE { vectors[i] = vld1q_f32(x + 16 * half + 4 * i); });
        dot_half_step(codes.val[half], codebook, scale, vectors, sums);
    });
}

/// Products of x with consecutive rows of a weight whose rows are whole blocks; x as `split_pairs` leaves it.
template <int rows>
void dot_rows(const Packed4bit weight, const Codebook16 codebook, const float *x, int64_t first, int64_t K, float *products) {
    const int64_t blocksize = weight.scales.blocksize, blocks = K / blocksize, stride = K / 2;
    const uint8_t *packed = weight.codes + first * stride;
    const BlockScales scales_of = weight.scales.from(first * blocks);
    float32x4_t sums[rows];
    unroll<rows>([&](auto row) BNB_INLINE { sums[row] = vdupq_n_f32(0); });
    float scales[rows];
    const auto add_step = [&]() BNB_INLINE {
        unroll<2>([&](auto half) BNB_INLINE {
            float32x4_t vectors[4];
            unroll<4>([&](auto i) BNB_INLINE { vectors[i] = vld1q_f32(x + 16 * half + 4 * i); });
            const uint8_t *bytes = packed;
            unroll<rows>([&](auto row) BNB_INLINE {
                const uint8x16_t pairs = vld1q_u8(bytes);
                const uint8x16_t codes = half == 0 ? vshrq_n_u8(pairs, 4) : vandq_u8(pairs, vdupq_n_u8(15));
                dot_half_step(codes, codebook, scales[row], vectors, sums[row]);
                bytes += stride;
                load_after(sums[row], bytes);
            });
        });
        packed += packed_step / 2;
        x += packed_step;
        load_after(sums[rows - 1], packed);
        load_after(sums[rows - 1], x);
    };
    for (int64_t block = 0; block < blocks; ++block) {
        unroll<rows>([&](auto row) BNB_INLINE { scales[row] = scales_of[row * blocks + block]; });
        if (blocksize == packed_step) add_step();
        for (int64_t pair = blocksize / (2 * packed_step); pair; --pair) {
            add_step();
            add_step();
        }
    }
    unroll<rows>([&](auto row) BNB_INLINE { products[row] = vaddvq_f32(sums[row]); });
}

/// The product of x with fewer weights than `packed_step`, of one block; reads no byte beyond them.
__attribute__((noinline)) float dot_rest(const uint8_t *packed, int64_t count, const Codebook16 codebook, float scale, const float *x) {
    uint8_t bytes[packed_step / 2] = {};
    float values[packed_step];
    std::memcpy(bytes, packed, static_cast<std::size_t>(count + 1) / 2);
    dequantize_step(bytes, codebook, scale, values);
    float32x4_t sums = vdupq_n_f32(0);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) sums = vfmaq_f32(sums, vld1q_f32(values + i), vld1q_f32(x + i));
    float sum = vaddvq_f32(sums);
    for (; i < count; ++i) sum += values[i] * x[i];
    return sum;
}

/// The product of x with elements begin to end of a weight, wherever they lie.
float dot_run(const Packed4bit &weight, const Codebook16 codebook, const float *x, int64_t begin, int64_t end) {
    float rest = 0;  // what fills no step
    float32x4_t sums = vdupq_n_f32(0);
    const int64_t pairs_of_steps = weight.scales.blocksize / (2 * packed_step);
    for_each_block(
        weight, begin, end, [&](float value) BNB_INLINE { rest = value * *x++; },
        [&](const uint8_t *packed, int64_t count, float scale) BNB_INLINE {
            for (; count >= packed_step; count -= packed_step, packed += packed_step / 2, x += packed_step) {
                dot_step(packed, codebook, scale, x, sums);
            }
            if (count) rest += dot_rest(packed, count, codebook, scale, x);
            x += count;
        },
        [&](const uint8_t *packed, float scale) BNB_INLINE {
            if (pairs_of_steps == 0) {  // a blocksize of one step
                dot_step(packed, codebook, scale, x, sums);
                x += packed_step;
            }
            for (int64_t pair = pairs_of_steps; pair; --pair, packed += packed_step, x += 2 * packed_step) {
                dot_step(packed, codebook, scale, x, sums);
                dot_step(packed + packed_step / 2, codebook, scale, x + packed_step, sums);
            }
        });
    return rest + vaddvq_f32(sums);
}

template <class T>
void multiply_row(
    const T *x, const Packed4bit &weight, int64_t N, int64_t K, const T *bias, T *y, float *scratch, int threads) {
    const Codebook16 codebook(weight.codebook);
    const bool whole_blocks = K % weight.scales.blocksize == 0;
    const float *row = whole_blocks ? split_pairs(x, K, scratch) : to_floats(x, K, scratch);
    const int64_t rows_of_grain = (grain / K + rows_at_once) / rows_at_once * rows_at_once;
    parallel_for(threads, N, rows_of_grain, [&](int64_t begin, int64_t end) {
        float products[rows_at_once];
        for (int64_t n = begin; n < end; n += rows_at_once) {
            const int64_t rows = std::min(rows_at_once, end - n);
            if (!whole_blocks) {
                for (int64_t i = 0; i < rows; ++i) products[i] = dot_run(weight, codebook, row, (n + i) * K, (n + i + 1) * K);
            } else if (rows == rows_at_once) {
                dot_rows<rows_at_once>(weight, codebook, row, n, K, products);
            } else {
                for (int64_t i = 0; i < rows; ++i) dot_rows<1>(weight, codebook, row, n + i, K, products + i);
            }
            for (int64_t i = 0; i < rows; ++i) store1(y + n + i, bias ? products[i] + load1(bias + n + i) : products[i]);
        }
    });
}

// --------------------------------------------------------------------------------------------------------- several rows of x

/// Rows and columns of a panel of the weight.
constexpr int panel_rows = 4;
constexpr int64_t panel_columns = 1024;

/// A column of a tile.
template <int vectors>
struct Column {
    float32x4_t vector[vectors];

    explicit Column(const float *x) {
        unroll<vectors>([&](auto v) BNB_INLINE { vector[v] = vld1q_f32(x + 4 * v); });
    }
    float32x4_t operator[](int v) const { return vector[v]; }
};

template <>
struct Column<4> {
    float32x4x4_t vectors;  // one instruction loads all

    explicit Column(const float *x) : vectors(vld1q_f32_x4(x)) {}
    float32x4_t operator[](int v) const { return vectors.val[v]; }
};

/// Adds products with a panel to `sums` [panel_rows][4 * vectors]. x has 4 * vectors rows, those of a column side by side.
///
/// 4 rows by 16: 16 registers of sums, 4 of weights, 4 of x, and room to load the next ones meanwhile.
template <int vectors>
void multiply_tile(const float *x, const float *panel, int64_t columns, float *sums) {
    float32x4_t sum[panel_rows][vectors], factor[panel_rows];
    for (int n = 0; n < panel_rows; ++n)
        for (int v = 0; v < vectors; ++v) sum[n][v] = vld1q_f32(sums + 4 * (n * vectors + v));
    const auto add_column = [&](auto lane) BNB_INLINE {
        const Column<vectors> column(x);
        x += 4 * vectors;
        load_after(factor[0], x);
        unroll<panel_rows>([&](auto n) BNB_INLINE {
            unroll<vectors>([&](auto v) BNB_INLINE { sum[n][v] = vfmaq_laneq_f32(sum[n][v], column[v], factor[n], lane); });
        });
    };
    const auto add_four_columns = [&](int64_t k) BNB_INLINE {
        unroll<panel_rows>([&](auto n) BNB_INLINE { factor[n] = vld1q_f32(panel + n * panel_columns + k); });
        unroll<4>(add_column);
    };
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) unroll<4>([&](auto i) BNB_INLINE { add_four_columns(k + 4 * i); });
    for (; k + 4 <= columns; k += 4) add_four_columns(k);
    for (; k < columns; ++k) {
        for (int n = 0; n < panel_rows; ++n) factor[n] = vdupq_n_f32(panel[n * panel_columns + k]);
        add_column(std::integral_constant<int, 0>());
    }
    for (int n = 0; n < panel_rows; ++n)
        for (int v = 0; v < vectors; ++v) vst1q_f32(sums + 4 * (n * vectors + v), sum[n][v]);
}

using MultiplyTile = void (*)(const float *x, const float *panel, int64_t columns, float *sums);
constexpr MultiplyTile multiply_tiles[] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>};

/// Stores products with up to 4 rows of x and of the weight, and adds the bias. Those with a row of the weight are side by side.
template <class T>
void store_products(const float *sums, int64_t stride, int64_t M, int64_t N, const T *bias, T *y, int64_t columns) {
    static_assert(panel_rows == 4, "the products of a row of x make a vector");
    if (N < panel_rows) {
        for (int64_t m = 0; m < M; ++m)
            for (int64_t n = 0; n < N; ++n) {
                const float product = sums[n * stride + m];
                store1(y + m * columns + n, bias ? product + load1(bias + n) : product);
            }
        return;
    }
    const float32x4x4_t rows = transpose(vld1q_f32(sums), vld1q_f32(sums + stride), vld1q_f32(sums + 2 * stride), vld1q_f32(sums + 3 * stride));
    for (int64_t m = 0; m < M; ++m) store4(y + m * columns, bias ? vaddq_f32(rows.val[m], load4(bias)) : rows.val[m]);
}

/// Multiplies up to `most_rows` rows of x, in tiles, by the rows of the weight from `first` on, at most `panel_rows` of them.
template <class T>
void multiply_panel(
    const Tiles &x, const Packed4bit &weight, const Codebook16 &codebook, int64_t first, int64_t N, const T *bias, T *y) {
    const int64_t rows = std::min<int64_t>(panel_rows, N - first), K = x.columns;
    float panel[panel_rows * panel_columns];
    float sums[panel_rows * most_rows] = {};
    if (rows < panel_rows) std::fill(panel + rows * panel_columns, panel + panel_rows * panel_columns, 0.0f);
    for (int64_t k = 0; k < K; k += panel_columns) {
        const int64_t columns = std::min(panel_columns, K - k);
        for (int64_t n = 0; n < rows; ++n) {
            const int64_t start = (first + n) * K + k;
            dequantize(weight, codebook, start, start + columns, panel + n * panel_columns);
        }
        for (int64_t m = 0; m < x.rows; m += tile_rows) {
            const int vectors = x.vectors(m);
            multiply_tiles[vectors - 1](x.at(m, k), panel, columns, sums + m * panel_rows);
        }
    }
    for (int64_t m = 0; m < x.rows; m += 4) {
        const int64_t tile = m - m % tile_rows, stride = 4 * x.vectors(tile);
        const float *sum = sums + tile * panel_rows + m % tile_rows;
        store_products(sum, stride, std::min<int64_t>(4, x.rows - m), rows, bias ? bias + first : nullptr, y + m * N + first, N);
    }
}

template <class T>
void multiply_rows(
    const T *x, int64_t M, const Packed4bit &weight, int64_t N, int64_t K, const T *bias, T *y, float *scratch, int threads) {
    const Codebook16 codebook(weight.codebook);
    const int64_t panels = (N + panel_rows - 1) / panel_rows;
    for (int64_t m = 0; m < M; m += most_rows) {
        const Tiles tiles{scratch, std::min(most_rows, M - m), K};
        fill_tiles(tiles, x + m * K, threads);
        parallel_for(threads, panels, std::max<int64_t>(1, grain / (panel_rows * K)), [&](int64_t begin, int64_t end) {
            for (int64_t panel = begin; panel < end; ++panel) {
                multiply_panel(tiles, weight, codebook, panel * panel_rows, N, bias, y + m * N);
            }
        });
    }
}

}  // namespace

int64_t gemm_4bit_scratch(int64_t M, int64_t K) {
    return M == 1 ? K : tiles_size(M, K);
}

void gemm_4bit(
    DType dtype, const void *x, int64_t M, const Packed4bit &weight, int64_t N, int64_t K, const void *bias, void *y, float *scratch,
    int threads) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        const T *rows = static_cast<const T *>(x), *added = static_cast<const T *>(bias);
        T *products = static_cast<T *>(y);
        if (M == 1) {
            multiply_row(rows, weight, N, K, added, products, scratch, threads);
        } else {
            multiply_rows(rows, M, weight, N, K, added, products, scratch, threads);
        }
    });
}

}  // namespace bnb
