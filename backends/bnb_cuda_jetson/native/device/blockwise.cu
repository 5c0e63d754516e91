// 8-bit blockwise quantization: quantize_blockwise and dequantize_blockwise.
#include "floats.cuh"
#include "nearest_code.cuh"
#include "quantize_blocks.cuh"

constexpr int kThreads = 256;    // of dequantize: one an entry of the codebook
constexpr int kTilesAtOnce = 2;  // tiles of eight elements a thread: loads in flight of each thread

template <class T>
__device__ void quantize(uint8* codes, float* absmax, const T* x, const float* codebook, int blocksize_shift, int64 n) {
  __shared__ NearestCode8bit table;
  table.build(codebook);
  const bool aligned = reinterpret_cast<size_t>(codes) % 16 == 0;
  quantize_blocks(x, table, absmax, blocksize_shift, n, [=](int64 at, const uint32(&found)[kPerThread]) {
    if (at + kPerThread <= n && aligned) {
      uint4 words = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words.x |= found[i] << (8 * i);
        words.y |= found[4 + i] << (8 * i);
        words.z |= found[8 + i] << (8 * i);
        words.w |= found[12 + i] << (8 * i);
      }
      *reinterpret_cast<uint4*>(codes + at) = words;
    } else {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (at + i < n) codes[at + i] = found[i];
      }
    }
  });
}

// Blocks of any size: the threads go over each block twice. Each has eight elements, neighbours for no better reason than that codes
// are found eight at a time.
template <class T>
__device__ void quantize_any(uint8* codes, float* absmax, const T* x, const float* codebook, int64 blocksize, int64 n) {
  __shared__ NearestCode8bit table;
  __shared__ uint32 warps[2][kQuantizeThreads / 32];
  table.build(codebook);
  int turn = 0;
  for (int64 block = blockIdx.x; block * blocksize < n; block += gridDim.x, turn ^= 1) {
    const int64 end = min((block + 1) * blocksize, n), start = block * blocksize + threadIdx.x * 8;
    uint32 largest = 0;
    for (int64 at = start; at < end; at += kQuantizeThreads * 8) {
      for (int i = 0; i < 8 && at + i < end; ++i) largest = max(largest, magnitude_bits(to_float(x[at + i])));
    }
    largest = largest_among(largest, kQuantizeThreads, warps[turn]);
    if (threadIdx.x == 0) absmax[block] = absmax_from(largest);
    const float scale = scale_from(largest);
    for (int64 at = start; at < end; at += kQuantizeThreads * 8) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = at + i < end && largest < kInfinityBits ? __fmul_rn(to_float(x[at + i]), scale) : 0.0f;
      }
      uint32 found[8];
      table.find(values, found);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (at + i < end) codes[at + i] = found[i];
      }
    }
  }
}

template <class T>
__device__ void dequantize(T* out, const uint8* codes, const float* absmax, const float* codebook, int64 blocksize, int blocksize_shift,
                           int64 n) {
  __shared__ float table[256];
  table[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  // Eight elements that start at a multiple of eight lie in one block, if its size is a power of two from 8.
  const bool by_eight =
      reinterpret_cast<size_t>(codes) % 8 == 0 && reinterpret_cast<size_t>(out) % 16 == 0 && blocksize_shift >= 3;
  const int64 end = by_eight ? n / 8 * 8 : 0;
  const int64 tile = int64(kThreads) * 8;
  for (int64 start = blockIdx.x * tile * kTilesAtOnce; start < end; start += gridDim.x * tile * kTilesAtOnce) {
    uint2 words[kTilesAtOnce];
    float scale[kTilesAtOnce];
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int64 at = min(start + i * tile + threadIdx.x * 8, end - 8);
      words[i] = *reinterpret_cast<const uint2*>(codes + at);
      scale[i] = absmax[at >> blocksize_shift];
    }
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int64 at = start + i * tile + threadIdx.x * 8;
      float values[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[j] = __fmul_rn(table[words[i].x >> (8 * j) & 255], scale[i]);
        values[4 + j] = __fmul_rn(table[words[i].y >> (8 * j) & 255], scale[i]);
      }
      if (at < end) store_eight(out + at, values);
    }
  }
  for (int64 at = end + int64(blockIdx.x) * kThreads + threadIdx.x; at < n; at += int64(gridDim.x) * kThreads) {
    const int64 block = blocksize_shift >= 0 ? at >> blocksize_shift : at / blocksize;
    out[at] = from_float<T>(__fmul_rn(table[codes[at]], absmax[block]));
  }
}

#define BLOCKWISE(name, T)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(kQuantizeThreads, 3) quantize_blockwise_##name(                                       \
      uint8* codes, float* absmax, const T* x, const float* codebook, int blocksize_shift, int64 n) {                             \
    quantize(codes, absmax, x, codebook, blocksize_shift, n);                                                                     \
  }                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(kQuantizeThreads, 3)                                                                  \
      quantize_any_##name(uint8* codes, float* absmax, const T* x, const float* codebook, int64 blocksize, int64 n) {             \
    quantize_any(codes, absmax, x, codebook, blocksize, n);                                                                       \
  }                                                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) dequantize_blockwise_##name(                                             \
      T* out, const uint8* codes, const float* absmax, const float* codebook, int64 blocksize, int blocksize_shift, int64 n) {    \
    dequantize(out, codes, absmax, codebook, blocksize, blocksize_shift, n);                                                      \
  }

BLOCKWISE(float32, float)
BLOCKWISE(float16, __half)
BLOCKWISE(bfloat16, __nv_bfloat16)
