/// grouped_gemm_4bit and its transposed: each expert's tokens are multiplied by that expert's weight.
#include "kernels/gemm_4bit.hpp"

namespace bnb {
namespace {

/// Calls `multiply(first token, tokens, weight)` for each expert that has tokens.
template <class Multiply>
void for_each_expert(const Experts &experts, int64_t elements, const Multiply &multiply) {
    const int64_t bytes = (elements + 1) / 2, blocksize = experts.weights.scales.blocksize;
    const int64_t blocks = (elements + blocksize - 1) / blocksize;
    for (int64_t expert = 0; expert < experts.count; ++expert) {
        const int64_t first = experts.offsets[expert], tokens = experts.offsets[expert + 1] - first;
        Packed4bit weight = experts.weights;
        weight.codes += expert * bytes;
        weight.scales = weight.scales.from(expert * blocks);
        if (tokens > 0) multiply(first, tokens, weight);
    }
}

template <class T>
const void *row(const void *x, int64_t number, int64_t columns) {
    return static_cast<const T *>(x) + number * columns;
}

template <class T>
void *row(void *x, int64_t number, int64_t columns) {
    return static_cast<T *>(x) + number * columns;
}

}  // namespace

int64_t grouped_gemm_4bit_scratch(int64_t tokens, int64_t K) {
    return gemm_4bit_scratch(std::max<int64_t>(tokens, 2), K);
}

void grouped_gemm_4bit(
    Gemm4bit *multiply, DType dtype, const void *x, const Experts &experts, int64_t N, int64_t K, void *y, float *scratch, int threads) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        for_each_expert(experts, N * K, [&](int64_t first, int64_t tokens, const Packed4bit &weight) {
            multiply(dtype, row<T>(x, first, K), tokens, weight, N, K, nullptr, row<T>(y, first, N), scratch, threads);
        });
    });
}

void grouped_gemm_4bit_transposed(
    DType dtype, const void *g, const Experts &experts, int64_t N, int64_t K, void *y, float *scratch, int threads) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        for_each_expert(experts, N * K, [&](int64_t first, int64_t tokens, const Packed4bit &weight) {
            gemm_4bit_transposed(dtype, row<T>(g, first, N), tokens, weight, N, K, row<T>(y, first, K), scratch, threads);
        });
    });
}

}  // namespace bnb
