/// Entry points of the LLM.int8 ops. What each computes is defined in bnb_core.ops.spec; tensors are contiguous and not empty.
#pragma once

#include <cstdint>

#include "elements.hpp"

namespace bnb {

/// A matrix of floating-point numbers, by rows.
struct Matrix {
    DType dtype;
    const void *values;
    int64_t rows, columns;
};

/// Fills codes [M, K], absmax [M] and, with one byte a column, outlier_mask [K].
void int8_quantize_rows(const Matrix &x, double threshold, int8_t *codes, float *absmax, uint8_t *outlier_mask, int threads);

/// Fills the same, and column codes [M, K] and absmax [K].
void int8_quantize_rows_cols(
    const Matrix &x, double threshold, int8_t *row_codes, float *row_absmax, int8_t *col_codes, float *col_absmax, uint8_t *outlier_mask,
    int threads);

/// Bytes of scratch memory that `int8_matmul` needs, of any alignment.
int64_t int8_matmul_scratch(int64_t M, int64_t K);

/// Fills product [M, N] with a [M, K] times the transposed b [N, K].
void int8_matmul(const int8_t *a, const int8_t *b, int64_t M, int64_t N, int64_t K, int32_t *product, void *scratch, int threads);

/// Fills y [M, N] with the product, scaled, plus `bias` [N] unless that is null.
void int8_matmul_dequant(
    const int32_t *product, const float *row_absmax, const float *col_absmax, const void *bias, int64_t M, int64_t N, DType dtype, void *y,
    int threads);

/// Fills x [M, K] with the values of the codes [M, K].
void int8_dequantize_rows(const int8_t *codes, const float *absmax, int64_t M, int64_t K, DType dtype, void *x, int threads);

/// An int8 weight: codes [N, K], absmax [N].
struct Int8Weight {
    const int8_t *codes;
    const float *absmax;
    int64_t rows, columns;
};

/// Bytes of scratch memory that `int8_linear` needs for M rows of x, of any alignment.
int64_t int8_linear_scratch(int64_t M, int64_t K, double threshold);

/// Fills y [M, N] with x [M, K] times the transposed weight, plus `bias` [N] unless that is null.
void int8_linear(
    const Matrix &x, const Int8Weight &weight, const void *bias, double threshold, void *y, void *scratch, int threads);

/// Floats of scratch memory that `int8_linear_transposed` needs for M rows of g.
int64_t int8_linear_transposed_scratch(int64_t M, int64_t N);

/// Fills y [M, K] with g [M, N] times the weight.
void int8_linear_transposed(const Matrix &g, const Int8Weight &weight, void *y, float *scratch, int threads);

}  // namespace bnb
