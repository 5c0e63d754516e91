// Rows of quantized tables: embedding_4bit and embedding_8bit. A warp dequantizes one row after another.
#include "floats.cuh"
#include "scales.cuh"

constexpr int kThreads = 256;

// Index of a row; stops the kernel, as torch's embedding does, where there is no such row.
__device__ inline int64 row_index(const void* indices, int index_bytes, int64 row, int64 rows) {
  const int64 index = index_bytes == 8 ? static_cast<const int64*>(indices)[row] : static_cast<const int*>(indices)[row];
  if (index < 0 || index >= rows) __trap();
  return index;
}

template <class T>
__device__ void embed_4bit(T* out, const void* indices, int index_bytes, const uint8* packed, const Scales& scales,
                           const float* codebook, int blocksize_shift, int64 rows, int64 dim, int64 count) {
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const bool by_eight = dim % 8 == 0 && reinterpret_cast<size_t>(packed) % 4 == 0 && reinterpret_cast<size_t>(out) % 16 == 0;
  for (int64 row = (int64(blockIdx.x) * kThreads + threadIdx.x) / 32; row < count; row += int64(gridDim.x) * kThreads / 32) {
    const int64 from = row_index(indices, index_bytes, row, rows) * dim;
    if (by_eight) {
      for (int64 column = lane * 8; column < dim; column += 32 * 8) {
        const uint32 codes = *reinterpret_cast<const uint32*>(packed + (from + column) / 2);
        const float scale = scales[(from + column) >> blocksize_shift];
        float values[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[2 * j] = __fmul_rn(table[codes >> (8 * j + 4) & 15], scale);
          values[2 * j + 1] = __fmul_rn(table[codes >> (8 * j) & 15], scale);
        }
        store_eight(out + row * dim + column, values);
      }
    } else {
      for (int64 column = lane; column < dim; column += 32) {
        const int64 at = from + column;
        const int code = packed[at / 2] >> (at % 2 ? 0 : 4) & 15;
        out[row * dim + column] = from_float<T>(__fmul_rn(table[code], scales[at >> blocksize_shift]));
      }
    }
  }
}

template <class T>
__device__ void embed_8bit(T* out, const void* indices, int index_bytes, const signed char* codes, const float* absmax, int64 rows,
                           int64 dim, int64 count) {
  const int lane = threadIdx.x % 32;
  const bool by_eight = dim % 8 == 0 && reinterpret_cast<size_t>(codes) % 8 == 0 && reinterpret_cast<size_t>(out) % 16 == 0;
  for (int64 row = (int64(blockIdx.x) * kThreads + threadIdx.x) / 32; row < count; row += int64(gridDim.x) * kThreads / 32) {
    const int64 index = row_index(indices, index_bytes, row, rows);
    const float scale = __fmul_rn(absmax[index], 1.0f / 127.0f);
    const signed char* from = codes + index * dim;
    if (by_eight) {
      for (int64 column = lane * 8; column < dim; column += 32 * 8) {
        const int2 words = *reinterpret_cast<const int2*>(from + column);
        float values[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[j] = __fmul_rn(float(words.x << (24 - 8 * j) >> 24), scale);
          values[4 + j] = __fmul_rn(float(words.y << (24 - 8 * j) >> 24), scale);
        }
        store_eight(out + row * dim + column, values);
      }
    } else {
      for (int64 column = lane; column < dim; column += 32) {
        out[row * dim + column] = from_float<T>(__fmul_rn(float(from[column]), scale));
      }
    }
  }
}

#define EMBEDDING(name, T)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                            \
      embedding_4bit_##name(T* out, const void* indices, int index_bytes, const uint8* packed, Scales scales, const float* codebook, \
                            int blocksize_shift, int64 rows, int64 dim, int64 count) {                                              \
    embed_4bit(out, indices, index_bytes, packed, scales, codebook, blocksize_shift, rows, dim, count);                             \
  }                                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                            \
      embedding_8bit_##name(T* out, const void* indices, int index_bytes, const signed char* codes, const float* absmax, int64 rows, \
                            int64 dim, int64 count) {                                                                               \
    embed_8bit(out, indices, index_bytes, codes, absmax, rows, dim, count);                                                         \
  }

EMBEDDING(float32, float)
EMBEDDING(float16, __half)
EMBEDDING(bfloat16, __nv_bfloat16)
