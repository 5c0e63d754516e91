// 8-bit blockwise quantization: quantize_blockwise and dequantize_blockwise.
#include "floats.cuh"
#include "nearest_code.cuh"
#include "quantize_blocks.cuh"

constexpr int kThreads = 256;   // of dequantize: one an entry of the codebook
constexpr int kRunsAtOnce = 4;  // that each of them has: so many loads are under way at a time

// Blocks of any size: the threads go over each block twice. Each has eight elements, neighbours for no better reason than that codes
// are found eight at a time.
template <class T>
__device__ void quantize_any(uint8* codes, float* absmax, const T* x, const float* codebook, int64 blocksize, int64 n) {
  __shared__ NearestCode8bit::Table storage;
  __shared__ uint32 warps[2][kQuantizeThreads / 32];
  const NearestCode8bit table(storage, codebook);
  int turn = 0;
  for (int64 block = blockIdx.x; block * blocksize < n; block += gridDim.x, turn ^= 1) {
    const int64 end = min((block + 1) * blocksize, n), start = block * blocksize + threadIdx.x * 8;
    uint32 largest = 0;
    for (int64 at = start; at < end; at += kQuantizeThreads * 8) {
      Eight<T> eight;
      eight.load(x, at, end - at, false);
      largest = max(largest, largest_magnitude(eight));
    }
    largest = largest_among(largest, kQuantizeThreads, warps[turn]);
    if (threadIdx.x == 0) absmax[block] = absmax_from(largest);
    for (int64 at = start; at < end; at += kQuantizeThreads * 8) {
      Eight<T> eight;
      eight.load(x, at, end - at, false);
      float values[1][8];
      eight.values(values[0]);
      uint32 words[2];
      table.find(values, largest, words);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (at + i < end) codes[at + i] = words[i / 4] >> (i % 4 * 8);
      }
    }
  }
}

template <class T>
__device__ void dequantize(T* out, const uint8* codes, const float* absmax, const float* codebook, int64 blocksize, int blocksize_shift,
                           int64 n) {
  __shared__ float table[256];
  using Codes = typename Run<T>::Codes;
  constexpr int kRun = Run<T>::kLength, kTile = kThreads * kRun * kRunsAtOnce;
  // A run lies in one block, if its size is a power of two from that of a run.
  const bool by_runs = reinterpret_cast<size_t>(codes) % sizeof(Codes) == 0 && reinterpret_cast<size_t>(out) % 16 == 0 &&
                       blocksize_shift >= 3;
  const int64 tile = int64(blockIdx.x) * kTile, start = tile + threadIdx.x * kRun;
  const bool simple = by_runs && tile + kTile <= n;
  Codes words[kRunsAtOnce];
  float scale[kRunsAtOnce];
  if (simple) {
#pragma unroll
    for (int i = 0; i < kRunsAtOnce; ++i) {
      const int64 at = start + i * kThreads * kRun;
      words[i] = *reinterpret_cast<const Codes*>(codes + at);
      scale[i] = absmax[at >> blocksize_shift];
    }
  }
  table[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  if (simple) {
#pragma unroll
    for (int i = 0; i < kRunsAtOnce; ++i) {
      float values[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) values[j] = __fmul_rn(table[code_of(words[i], j)], scale[i]);
      Run<T>::store(out + start + i * kThreads * kRun, values);
    }
  } else {
#pragma unroll 1
    for (int64 at = tile + threadIdx.x; at < min(tile + kTile, n); at += kThreads) {
      const int64 block = blocksize_shift >= 0 ? at >> blocksize_shift : at / blocksize;
      out[at] = from_float<T>(__fmul_rn(table[codes[at]], absmax[block]));
    }
  }
}

#define BLOCKWISE(name, T)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(kQuantizeThreads, 4) quantize_blockwise_##name(                                 \
      uint8* codes, float* absmax, const T* x, const float* codebook, int blocksize_shift, int64 n) {                          \
    quantize_blocks<NearestCode8bit>(codes, absmax, x, codebook, blocksize_shift, n);                                          \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(kQuantizeThreads, 4)                                                            \
      quantize_any_##name(uint8* codes, float* absmax, const T* x, const float* codebook, int64 blocksize, int64 n) {          \
    quantize_any(codes, absmax, x, codebook, blocksize, n);                                                                    \
  }                                                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads) dequantize_blockwise_##name(                                          \
      T* out, const uint8* codes, const float* absmax, const float* codebook, int64 blocksize, int blocksize_shift, int64 n) { \
    dequantize(out, codes, absmax, codebook, blocksize, blocksize_shift, n);                                                   \
  }

BLOCKWISE(float32, float)
BLOCKWISE(float16, __half)
BLOCKWISE(bfloat16, __nv_bfloat16)
