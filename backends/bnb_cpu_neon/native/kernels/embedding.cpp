/// embedding_4bit and embedding_8bit: one form for all tiers.
#include "kernels/embedding.hpp"

#include "kernels/int8_rows.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

/// Calls `fill(index, row of out)` for every index.
template <class T, class Fill>
void for_each_row(const Indices &indices, int64_t width, T *out, int threads, const Fill &fill) {
    parallel_for(threads, indices.count, std::max<int64_t>(1, grain / width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) fill(indices[i], out + i * width);
    });
}

}  // namespace

void embedding_4bit(const Indices &indices, const Packed4bit &table, int64_t width, DType dtype, void *out, int threads) {
    const Codebook16 codebook(table.codebook);
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        for_each_row(indices, width, static_cast<T *>(out), threads, [&](int64_t index, T *row) {
            dequantize(table, codebook, index * width, (index + 1) * width, row);
        });
    });
}

void embedding_8bit(
    const Indices &indices, const int8_t *codes, const float *absmax, int64_t width, DType dtype, void *out, int threads) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        for_each_row(indices, width, static_cast<T *>(out), threads, [&](int64_t index, T *row) {
            dequantize_int8_row(codes + index * width, int8_row_scale(absmax[index]), width, row);
        });
    });
}

}  // namespace bnb
