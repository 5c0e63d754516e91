// Quantization of blocks whose size is a power of two, 32 to 4096. A thread holds sixteen elements in registers from the load to the
// store, so that each is read once; the threads of a block find its absmax together.
#pragma once

#include "floats.cuh"
#include "nearest_code.cuh"

constexpr int kQuantizeThreads = 256;
constexpr int kPerThread = 16;
constexpr int kTile = kQuantizeThreads * kPerThread;  // elements

constexpr uint32 kInfinityBits = 0x7f800000u;
constexpr uint32 kFloorBits = 0x00800000u;  // 2^-126, the smallest absmax that is divided by

// Magnitudes are compared as integers: their order is that of the values, with NaN above infinity.
__device__ inline uint32 magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The largest magnitude of some values, as bits.
template <int kCount>
__device__ inline uint32 largest_magnitude(const float (&values)[kCount]) {
#if __CUDA_ARCH__ >= 800
  float largest = fabsf(values[0]);
#pragma unroll
  for (int i = 1; i < kCount; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(values[i])));
  return __float_as_uint(largest);
#else
  uint32 largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = max(largest, magnitude_bits(values[i]));
  return largest;
#endif
}

// The absmax of a block, from its bits: any NaN becomes the one NaN.
__device__ inline float absmax_from(uint32 bits) { return __uint_as_float(bits > kInfinityBits ? 0x7fc00000u : bits); }

// 1 / absmax, correctly rounded. 0 where the absmax is not finite: all elements then take the code of 0.
__device__ inline float scale_from(uint32 bits) {
  return bits >= kInfinityBits ? 0.0f : __frcp_rn(__uint_as_float(max(bits, kFloorBits)));
}

// The largest magnitude among `threads` neighbouring threads, a power of two up to 512, of which `largest` is each one's. `warps` is
// shared memory for a word a warp. With more than 32 threads, all of the thread block must call it, which is a barrier.
__device__ inline uint32 largest_among(uint32 largest, int threads, uint32* warps) {
  for (int distance = min(threads, 32) / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  if (threads > 32) {
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
    __syncthreads();
    const int group = threads / 32, first = threadIdx.x / threads * group;
    for (int i = 0; i < group; ++i) largest = max(largest, warps[first + i]);
  }
  return largest;
}

// Quantize with a table of codes, which is in shared memory. `store(at, codes)` gets the codes of kPerThread elements.
template <class T, class Table, class Store>
__device__ void quantize_blocks(const T* x, const Table& table, float* absmax, int blocksize_shift, int64 n, Store store) {
  __shared__ uint32 warps[2][kQuantizeThreads / 32];
  constexpr int kEights = kPerThread / 8;
  const bool aligned = reinterpret_cast<size_t>(x) % 16 == 0;
  const int threads = (1 << blocksize_shift) / kPerThread;  // of a block
  const int64 stride = int64(gridDim.x) * kTile;
  Eight<T> next[kEights];
  int64 at = int64(blockIdx.x) * kTile + threadIdx.x * kPerThread;
#pragma unroll
  for (int i = 0; i < kEights; ++i) next[i].load(x, at + 8 * i, n - at - 8 * i, aligned && at + 8 * i + 8 <= n);
  // Every thread of the block takes part in each tile, for the barriers; two rows of `warps` in turn make one barrier enough.
  int turn = 0;
  for (int64 tile = int64(blockIdx.x) * kTile; tile < n; tile += stride, turn ^= 1) {
    float values[kPerThread];
#pragma unroll
    for (int i = 0; i < kEights; ++i) next[i].values(values + 8 * i);
    if (tile + stride < n) {
#pragma unroll
      for (int i = 0; i < kEights; ++i) {
        const int64 first = at + stride + 8 * i;
        next[i].load(x, first, n - first, aligned && first + 8 <= n);
      }
    }
    const uint32 largest = largest_among(largest_magnitude(values), threads, warps[turn]);
    if (threadIdx.x % threads == 0 && at < n) absmax[at >> blocksize_shift] = absmax_from(largest);
    const float scale = scale_from(largest);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      values[i] = __fmul_rn(Table::kTakesNan || largest < kInfinityBits ? values[i] : 0.0f, scale);
    }
    uint32 codes[kPerThread];
    table.find(values, codes);
    store(at, codes);
    at += stride;
  }
}
