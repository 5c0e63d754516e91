// gemm_4bit, gemm_4bit_transposed and the grouped ones for any shape, alignment and dtype.
#include "tiled_product.cuh"
#include "weight_4bit.cuh"

template <bool kTransposed, class T>
__device__ void multiply(T* y, const T* x, Weight4bit weight, const T* bias, int64 rows, const int* offsets, int experts) {
  __shared__ float entries[16];  // lanes look up different ones
  if (threadIdx.x < 16) entries[threadIdx.x] = weight.codebook[threadIdx.x];
  __syncthreads();
  weight.codebook = entries;
  const int64 outputs = kTransposed ? weight.K : weight.N, terms = kTransposed ? weight.N : weight.K;
  int64 first_row = int64(blockIdx.y) * kTileRows;
  if (experts) {
    const Tokens tokens = piece_of_tokens(offsets, experts, blockIdx.y, kTileRows);
    if (!tokens.count) return;
    weight = weight.expert(tokens.expert);
    first_row = tokens.first;
    rows = tokens.first + tokens.count;
  }
  multiply_tile_of_any_shape<kTransposed>(y, x, weight, bias, rows, outputs, terms, first_row, int64(blockIdx.x) * kTileOutputs);
}

#define ANY(name, T)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                                                                      \
      gemm_4bit_any_##name(T* y, const T* x, Weight4bit weight, const T* bias, int64 rows, const int* offsets, int experts) {     \
    multiply<false>(y, x, weight, bias, rows, offsets, experts);                                                                  \
  }                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(kTileThreads, 2)                                                                      \
      gemm_4bit_transposed_any_##name(T* y, const T* x, Weight4bit weight, int64 rows, const int* offsets, int experts) {         \
    multiply<true>(y, x, weight, static_cast<const T*>(nullptr), rows, offsets, experts);                                         \
  }

ANY(float32, float)
ANY(float16, __half)
ANY(bfloat16, __nv_bfloat16)
