/// Bindings of the int8 ops.
#include "kernels/int8.hpp"

#include "arguments.hpp"

namespace bnb {

using Codes = Data<const int8_t>;
using Floats = Data<const float>;
using Anything = Data<const void>;

void bind_int8(nb::module_ &module) {
    module.def(
        "int8_quantize_rows",
        [](DType dtype, Anything x, int64_t M, int64_t K, double threshold, Data<int8_t> codes, Data<float> absmax,
           Data<uint8_t> outlier_mask, int threads) {
            int8_quantize_rows({dtype, x, M, K}, threshold, codes, absmax, outlier_mask, threads);
        },
        without_gil());
    module.def(
        "int8_quantize_rows_cols",
        [](DType dtype, Anything x, int64_t M, int64_t K, double threshold, Data<int8_t> row_codes, Data<float> row_absmax,
           Data<int8_t> col_codes, Data<float> col_absmax, Data<uint8_t> outlier_mask, int threads) {
            const Matrix matrix{dtype, x, M, K};
            int8_quantize_rows_cols(matrix, threshold, row_codes, row_absmax, col_codes, col_absmax, outlier_mask, threads);
        },
        without_gil());
    module.def("int8_matmul_scratch", int8_matmul_scratch);
    module.def(
        "int8_matmul",
        [](Codes a, Codes b, int64_t M, int64_t N, int64_t K, Data<int32_t> product, Data<void> scratch, int threads) {
            int8_matmul(a, b, M, N, K, product, scratch, threads);
        },
        without_gil());
    def_with_none(
        module, "int8_matmul_dequant",
        [](Data<const int32_t> product, Floats row_absmax, Floats col_absmax, std::optional<Anything> bias, int64_t M, int64_t N,
           DType dtype, Data<void> y, int threads) {
            int8_matmul_dequant(product, row_absmax, col_absmax, bias.value_or(Anything{}), M, N, dtype, y, threads);
        });
    module.def(
        "int8_dequantize_rows",
        [](Codes codes, Floats absmax, int64_t M, int64_t K, DType dtype, Data<void> x, int threads) {
            int8_dequantize_rows(codes, absmax, M, K, dtype, x, threads);
        },
        without_gil());
    module.def("int8_linear_scratch", int8_linear_scratch);
    def_with_none(
        module, "int8_linear",
        [](DType dtype, Anything x, int64_t M, Codes codes, Floats absmax, int64_t N, int64_t K, std::optional<Anything> bias,
           double threshold, Data<void> y, Data<void> scratch, int threads) {
            int8_linear({dtype, x, M, K}, {codes, absmax, N, K}, bias.value_or(Anything{}), threshold, y, scratch, threads);
        });
    module.def("int8_linear_transposed_scratch", int8_linear_transposed_scratch);
    module.def(
        "int8_linear_transposed",
        [](DType dtype, Anything g, int64_t M, Codes codes, Floats absmax, int64_t N, int64_t K, Data<void> y, Data<float> scratch,
           int threads) { int8_linear_transposed({dtype, g, M, N}, {codes, absmax, N, K}, y, scratch, threads); },
        without_gil());
}

}  // namespace bnb
