// Quantization of blocks whose size is a power of two, 32 to 4096. A thread holds eight elements in registers from the load to the
// store, so that each is read once; the threads of a block find its absmax together.
#pragma once

#include "floats.cuh"
#include "nearest_code.cuh"

constexpr int kQuantizeThreads = 512;
constexpr int kTile = kQuantizeThreads * 8;  // elements; the largest block

constexpr uint32 kInfinityBits = 0x7f800000u;
constexpr uint32 kFloorBits = 0x00800000u;  // 2^-126, the smallest absmax that is divided by

// Magnitudes are compared as integers: their order is that of the values, with NaN above infinity.
__device__ inline uint32 magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

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

// Eight elements starting at `at`; zeros from `n` on. Elements are converted later, so that the loads of a thread overlap.
template <class T>
struct EightRaw {
  uint4 words[sizeof(T) / 2];

  __device__ void load(const T* x, int64 at, int64 n, bool aligned) {
    if (at + 8 <= n && aligned) {
#pragma unroll
      for (int i = 0; i < int(sizeof(T) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(x + at)[i];
    } else {
      T elements[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) elements[i] = at + i < n ? x[at + i] : from_float<T>(0.0f);
      pack(elements);
    }
  }

  __device__ void values(float (&values)[8]) const;

 private:
  __device__ void pack(const T (&elements)[8]);
};

template <>
__device__ inline void EightRaw<float>::values(float (&values)[8]) const {
  values[0] = __uint_as_float(words[0].x), values[1] = __uint_as_float(words[0].y);
  values[2] = __uint_as_float(words[0].z), values[3] = __uint_as_float(words[0].w);
  values[4] = __uint_as_float(words[1].x), values[5] = __uint_as_float(words[1].y);
  values[6] = __uint_as_float(words[1].z), values[7] = __uint_as_float(words[1].w);
}

template <class T>
__device__ inline void EightRaw<T>::values(float (&values)[8]) const {
  unpack_two<T>(words[0].x, values[0], values[1]);
  unpack_two<T>(words[0].y, values[2], values[3]);
  unpack_two<T>(words[0].z, values[4], values[5]);
  unpack_two<T>(words[0].w, values[6], values[7]);
}

template <>
__device__ inline void EightRaw<float>::pack(const float (&elements)[8]) {
  words[0] = make_uint4(__float_as_uint(elements[0]), __float_as_uint(elements[1]), __float_as_uint(elements[2]),
                        __float_as_uint(elements[3]));
  words[1] = make_uint4(__float_as_uint(elements[4]), __float_as_uint(elements[5]), __float_as_uint(elements[6]),
                        __float_as_uint(elements[7]));
}

template <class T>
__device__ inline void EightRaw<T>::pack(const T (&elements)[8]) {
  words[0] = make_uint4(pack_two<T>(to_float(elements[0]), to_float(elements[1])), pack_two<T>(to_float(elements[2]), to_float(elements[3])),
                        pack_two<T>(to_float(elements[4]), to_float(elements[5])), pack_two<T>(to_float(elements[6]), to_float(elements[7])));
}

// Quantize with a table of codes, which is in shared memory. `store(at, codes)` gets the codes of eight elements.
template <class T, class Table, class Store>
__device__ void quantize_blocks(const T* x, const Table& table, float* absmax, int blocksize_shift, int64 n, Store store) {
  __shared__ uint32 warps[2][kQuantizeThreads / 32];
  const auto layout = table.layout();
  const bool aligned = reinterpret_cast<size_t>(x) % 16 == 0;
  const int threads = 1 << (blocksize_shift - 3);  // of a block
  const int64 stride = int64(gridDim.x) * kTile;
  EightRaw<T> next;
  int64 at = int64(blockIdx.x) * kTile + threadIdx.x * 8;
  next.load(x, at, n, aligned);
  // Every thread of the block takes part in each tile, for the barriers; two rows of `warps` in turn make one barrier enough.
  for (int64 tile = blockIdx.x, turn = 0; tile * kTile < n; tile += gridDim.x, turn ^= 1) {
    const EightRaw<T> raw = next;
    if (at + stride < n) next.load(x, at + stride, n, aligned);
    float values[8];
    raw.values(values);
    uint32 largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max(largest, magnitude_bits(values[i]));
    largest = largest_among(largest, threads, warps[turn]);
    if (threadIdx.x % threads == 0 && at < n) absmax[at >> blocksize_shift] = absmax_from(largest);
    const float scale = scale_from(largest);
    if (largest >= kInfinityBits) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = 0.0f;  // infinity times 0 would be NaN
    }
    uint32 codes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = table.code(layout, __fmul_rn(values[i], scale));
    store(at, codes);
    at += stride;
  }
}
