// int8_matmul, int8_linear and int8_linear_transposed for any shape and alignment.
#include "int8_linear.cuh"
#include "tiled_product.cuh"

constexpr int kWords = 16;  // of four codes, that are summed over at a time

// Four codes from column k of a row on, zeros beyond its end.
__device__ inline uint32 four_codes(const int8* row, int64 k, int64 K, bool aligned) {
  if (aligned && k + 4 <= K) return *reinterpret_cast<const uint32*>(row + k);
  uint32 word = 0;
  for (int i = 0; i < 4 && k + i < K; ++i) word |= uint32(uint8(row[k + i])) << (8 * i);
  return word;
}

// Products of rows down, down + 16 and outputs across, across + 16, +32, +48 of a tile of a b^T.
__device__ inline void multiply(int (&products)[2][4], const int8* a, const int8* b, int64 rows, int64 N, int64 K, int64 first_row,
                                int64 first_output) {
  __shared__ uint32 left[kWords][kTileRows + 1];
  __shared__ uint32 right[kWords][kTileOutputs + 1];
  const bool aligned = K % 4 == 0 && reinterpret_cast<size_t>(a) % 4 == 0 && reinterpret_cast<size_t>(b) % 4 == 0;
  const int across = threadIdx.x % 16, down = threadIdx.x / 16;
  for (int64 start = 0; start < K; start += 4 * kWords) {
    for (int i = threadIdx.x; i < (kTileRows + kTileOutputs) * kWords; i += kTileThreads) {
      const int line = i / kWords, word = i % kWords;
      const int64 k = start + 4 * word;
      if (line < kTileRows) {
        const int64 row = first_row + line;
        left[word][line] = row < rows ? four_codes(a + row * K, k, K, aligned) : 0;
      } else {
        const int64 output = first_output + line - kTileRows;
        right[word][line - kTileRows] = output < N ? four_codes(b + output * K, k, K, aligned) : 0;
      }
    }
    __syncthreads();
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int& product = products[i / 4][i % 4];
        product = dot_four(left[word][down + i / 4 * 16], right[word][across + i % 4 * 16], product);
      }
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(kTileThreads, 2)
    int8_matmul_any(int* y, const int8* a, const int8* b, int64 rows, int64 N, int64 K) {
  const int64 first_row = int64(blockIdx.y) * kTileRows, first_output = int64(blockIdx.x) * kTileOutputs;
  int products[2][4] = {};
  multiply(products, a, b, rows, N, K, first_row, first_output);
  for (int i = 0; i < 8; ++i) {
    const int64 row = first_row + threadIdx.x / 16 + i / 4 * 16, output = first_output + threadIdx.x % 16 + i % 4 * 16;
    if (row < rows && output < N) y[row * N + output] = products[i / 4][i % 4];
  }
}

template <class T>
__device__ void linear_any(const Int8Linear<T>& linear, const int8* x_codes) {
  const int64 first_row = int64(blockIdx.y) * kTileRows, first_output = int64(blockIdx.x) * kTileOutputs;
  int products[2][4] = {};
  multiply(products, x_codes, linear.codes, linear.rows, linear.N, linear.K, first_row, first_output);
  const int64 row = first_row + threadIdx.x / 16, output = first_output + threadIdx.x % 16;
  const int64 rows[2] = {row, row + 16}, outputs[4] = {output, output + 16, output + 32, output + 48};
  finish_linear(linear, products, rows, outputs);
}

struct Int8Weight {
  const int8* codes;
  const float* absmax;
  int64 K;

  __device__ float value(int64 row, int64 column) const {
    return __fmul_rn(static_cast<float>(codes[row * K + column]), __fmul_rn(absmax[row], 1.0f / 127.0f));
  }
};

#define ANY(name, T)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                                                            \
      int8_linear_any_##name(Int8Linear<T> linear, const int8* x_codes) {                                                  \
    linear_any(linear, x_codes);                                                                                           \
  }                                                                                                                        \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                                                            \
      int8_linear_transposed_any_##name(T* y, const T* g, const int8* codes, const float* absmax, int64 rows, int64 N, int64 K) { \
    multiply_tile_of_any_shape<true>(y, g, Int8Weight{codes, absmax, K}, static_cast<const T*>(nullptr), rows, K, N,       \
                                     int64(blockIdx.y) * kTileRows, int64(blockIdx.x) * kTileOutputs);                     \
  }

ANY(float32, float)
ANY(float16, __half)
ANY(bfloat16, __nv_bfloat16)
