/// gemm_4bit_transposed: the gradient of a product.
#include "kernels/gemm_4bit.hpp"
#include "kernels/transposed.hpp"

namespace bnb {

int64_t gemm_4bit_transposed_scratch(int64_t M, int64_t N) { return tiles_size(M, N); }

void gemm_4bit_transposed(
    DType dtype, const void *g, int64_t M, const Packed4bit &weight, int64_t N, int64_t K, void *y, float *scratch, int threads) {
    const Codebook16 codebook(weight.codebook);
    const auto part = [&](int64_t row, int64_t column, int64_t count, float *out) {
        const int64_t start = row * K + column;
        dequantize(weight, codebook, start, start + count, out);
    };
    multiply_transposed(dtype, g, M, N, K, part, y, scratch, threads);
}

}  // namespace bnb
