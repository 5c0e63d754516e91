// LLM.int8() (arXiv 2208.07339): quantization by rows and by columns, and what is done element by element.
#include "int8_quantize.cuh"

constexpr int kThreads = 256;

// A row a block. The mask is complete already, unless `own_mask`: then there is one row, and the mask is made of it.
template <class T>
__device__ void quantize_rows(int8* codes, float* absmax, bool* mask, const T* x, int64 rows, int64 K, float threshold, bool own_mask) {
  for (int64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const from = x + row * K;
    uint32 largest = 0;
    for (int64 k = threadIdx.x; k < K; k += kThreads) {
      const float value = to_float(from[k]);
      largest = max(largest, magnitude_bits(below(value, threshold)));
      if (own_mask) mask[k] = threshold > 0.0f && fabsf(value) >= threshold;
    }
    const float row_absmax = __uint_as_float(block_maximum<kThreads>(largest));
    const float scale = quantization_scale(row_absmax);
    if (threadIdx.x == 0) absmax[row] = row_absmax;
    for (int64 k = threadIdx.x; k < K; k += kThreads) {
      codes[row * K + k] = mask[k] ? 0 : quantize(below(to_float(from[k]), threshold), scale);
    }
  }
}

// Outliers and, unless null, the absmax of each column: 32 columns a block, every eighth row a warp.
template <class T>
__device__ void inspect_columns(bool* mask, float* absmax, const T* x, int64 rows, int64 K, float threshold) {
  __shared__ uint32 largest_of[8][32];
  __shared__ bool outlier_in[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64 k = int64(blockIdx.x) * 32 + lane;
  uint32 largest = 0;
  bool outlier = false;
  for (int64 row = warp; row < rows && k < K; row += 8) {
    const float value = to_float(x[row * K + k]);
    largest = max(largest, magnitude_bits(below(value, threshold)));
    outlier |= threshold > 0.0f && fabsf(value) >= threshold;
  }
  largest_of[warp][lane] = largest;
  outlier_in[warp][lane] = outlier;
  __syncthreads();
  if (warp || k >= K) return;
  for (int i = 1; i < 8; ++i) {
    largest = max(largest, largest_of[i][lane]);
    outlier |= outlier_in[i][lane];
  }
  mask[k] = outlier;
  if (absmax) absmax[k] = __uint_as_float(largest);
}

template <class T>
__device__ void quantize_columns(int8* codes, const float* absmax, const T* x, int64 rows, int64 K, float threshold) {
  for (int64 k = int64(blockIdx.x) * kThreads + threadIdx.x; k < K; k += int64(gridDim.x) * kThreads) {
    const float scale = quantization_scale(absmax[k]);
    for (int64 row = blockIdx.y; row < rows; row += gridDim.y) {
      codes[row * K + k] = quantize(below(to_float(x[row * K + k]), threshold), scale);
    }
  }
}

template <class T>
__device__ void scale_products(T* y, const int* products, const float* row_absmax, const float* column_absmax, const T* bias, int64 rows,
                               int64 N) {
  for (int64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const float row_scale = row_absmax[row] * (1.0f / (127.0f * 127.0f));
#pragma unroll 1
    for (int64 n = int64(blockIdx.x) * kThreads + threadIdx.x; n < N; n += int64(gridDim.x) * kThreads) {
      const float value = static_cast<float>(products[row * N + n]) * row_scale * column_absmax[n];
      y[row * N + n] = from_float<T>(bias ? value + to_float(bias[n]) : value);
    }
  }
}

template <class T>
__device__ void dequantize_rows(T* x, const int8* codes, const float* absmax, int64 rows, int64 K) {
  for (int64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const float scale = __fmul_rn(absmax[row], 1.0f / 127.0f);
    for (int64 k = int64(blockIdx.x) * kThreads + threadIdx.x; k < K; k += int64(gridDim.x) * kThreads) {
      x[row * K + k] = from_float<T>(__fmul_rn(static_cast<float>(codes[row * K + k]), scale));
    }
  }
}

#define INT8(name, T)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(kThreads) int8_quantize_rows_##name(                                                     \
      int8* codes, float* absmax, bool* mask, const T* x, int64 rows, int64 K, float threshold, int own_mask) {                  \
    quantize_rows(codes, absmax, mask, x, rows, K, threshold, own_mask);                                                                \
  }                                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                                \
      int8_inspect_columns_##name(bool* mask, float* absmax, const T* x, int64 rows, int64 K, float threshold) {                        \
    inspect_columns(mask, absmax, x, rows, K, threshold);                                                                               \
  }                                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                                \
      int8_quantize_columns_##name(int8* codes, const float* absmax, const T* x, int64 rows, int64 K, float threshold) {         \
    quantize_columns(codes, absmax, x, rows, K, threshold);                                                                             \
  }                                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                                \
      int8_matmul_dequant_##name(T* y, const int* products, const float* row_absmax, const float* column_absmax, const T* bias,         \
                                 int64 rows, int64 N) {                                                                                 \
    scale_products(y, products, row_absmax, column_absmax, bias, rows, N);                                                              \
  }                                                                                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                                \
      int8_dequantize_rows_##name(T* x, const int8* codes, const float* absmax, int64 rows, int64 K) {                           \
    dequantize_rows(x, codes, absmax, rows, K);                                                                                         \
  }

INT8(float32, float)
INT8(float16, __half)
INT8(bfloat16, __nv_bfloat16)
