/// int8_linear_transposed: the gradient of int8_linear, exact but for rounding.
#include "kernels/int8.hpp"
#include "kernels/int8_rows.hpp"
#include "kernels/transposed.hpp"

namespace bnb {

int64_t int8_linear_transposed_scratch(int64_t M, int64_t N) { return tiles_size(M, N); }

void int8_linear_transposed(const Matrix &g, const Int8Weight &weight, void *y, float *scratch, int threads) {
    const auto part = [&](int64_t row, int64_t column, int64_t count, float *out) {
        dequantize_int8_row(weight.codes + row * weight.columns + column, int8_row_scale(weight.absmax[row]), count, out);
    };
    multiply_transposed(g.dtype, g.values, g.rows, weight.rows, weight.columns, part, y, scratch, threads);
}

}  // namespace bnb
