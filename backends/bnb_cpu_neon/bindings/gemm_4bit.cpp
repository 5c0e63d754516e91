/// Bindings of the products with 4-bit weights.
#include "kernels/gemm_4bit.hpp"

#include "arguments.hpp"

namespace bnb {

/// Binds a product, and that of experts which is made of it.
template <Gemm4bit multiply>
static void bind_products(nb::module_ &module, const char *name, const char *grouped_name) {
    def_with_none(
        module, name,
        [](DType dtype, Data<const void> x, int64_t M, Data<const uint8_t> packed, Data<const void> absmax, Data<const float> codebook,
           int64_t blocksize, std::optional<Nested> nested, int64_t N, int64_t K, std::optional<Data<const void>> bias, Data<void> y,
           Data<float> scratch, int threads) {
            const Packed4bit weight = packed_tensor(packed, absmax, codebook, blocksize, nested);
            multiply(dtype, x, M, weight, N, K, bias.value_or(Data<const void>{}), y, scratch, threads);
        });
    def_with_none(
        module, grouped_name,
        [](DType dtype, Data<const void> x, Data<const int32_t> offsets, int64_t experts, Data<const uint8_t> packed,
           Data<const void> absmax, Data<const float> codebook, int64_t blocksize, std::optional<Nested> nested, int64_t N, int64_t K,
           Data<void> y, Data<float> scratch, int threads) {
            const Packed4bit weights = packed_tensor(packed, absmax, codebook, blocksize, nested);
            grouped_gemm_4bit(multiply, dtype, x, {offsets, experts, weights}, N, K, y, scratch, threads);
        });
}

void bind_gemm_4bit(nb::module_ &module) {
    bind_products<gemm_4bit>(module, "gemm_4bit", "grouped_gemm_4bit");
    bind_products<fast_gemm_4bit>(module, "fast_gemm_4bit", "fast_grouped_gemm_4bit");
    module.def("gemm_4bit_scratch", gemm_4bit_scratch);
    module.def("gemm_4bit_transposed_scratch", gemm_4bit_transposed_scratch);
    def_with_none(
        module, "gemm_4bit_transposed",
        [](DType dtype, Data<const void> g, int64_t M, Data<const uint8_t> packed, Data<const void> absmax, Data<const float> codebook,
           int64_t blocksize, std::optional<Nested> nested, int64_t N, int64_t K, Data<void> y, Data<float> scratch, int threads) {
            const Packed4bit weight = packed_tensor(packed, absmax, codebook, blocksize, nested);
            gemm_4bit_transposed(dtype, g, M, weight, N, K, y, scratch, threads);
        });
    module.def("grouped_gemm_4bit_scratch", grouped_gemm_4bit_scratch);
    def_with_none(
        module, "grouped_gemm_4bit_transposed",
        [](DType dtype, Data<const void> g, Data<const int32_t> offsets, int64_t experts, Data<const uint8_t> packed,
           Data<const void> absmax, Data<const float> codebook, int64_t blocksize, std::optional<Nested> nested, int64_t N, int64_t K,
           Data<void> y, Data<float> scratch, int threads) {
            const Packed4bit weights = packed_tensor(packed, absmax, codebook, blocksize, nested);
            grouped_gemm_4bit_transposed(dtype, g, {offsets, experts, weights}, N, K, y, scratch, threads);
        });
}

}  // namespace bnb
