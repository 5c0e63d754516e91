// The absmax of a block, its scale, and the largest among neighbouring threads.
#pragma once

#include "floats.cuh"

constexpr uint32 kInfinityBits = 0x7f800000u;
constexpr uint32 kFloorBits = 0x00800000u;  // 2^-126, the smallest absmax that is divided by

// The largest magnitude of some values, as bits. As integers magnitudes have the order of the values, with NaN above infinity.
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
  for (int i = 0; i < kCount; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
  return largest;
#endif
}

// The same of eight elements as they lie in memory.
template <class T>
__device__ inline uint32 largest_magnitude(const Eight<T>& eight) {
  float values[8];
  eight.values(values);
  return largest_magnitude(values);
}
#if __CUDA_ARCH__ >= 860
// Two at a time. What is left over of the sign does not matter.
#define LARGEST_MAGNITUDE(T, type)                                                               \
  template <>                                                                                    \
  __device__ inline uint32 largest_magnitude<T>(const Eight<T>& eight) {                         \
    const uint4 words = eight.words[0];                                                          \
    uint32 first, second, pair;                                                                  \
    asm("max.NaN.xorsign.abs." type " %0, %1, %2;" : "=r"(first) : "r"(words.x), "r"(words.y));  \
    asm("max.NaN.xorsign.abs." type " %0, %1, %2;" : "=r"(second) : "r"(words.z), "r"(words.w)); \
    asm("max.NaN.xorsign.abs." type " %0, %1, %2;" : "=r"(pair) : "r"(first), "r"(second));      \
    float two[2];                                                                                \
    unpack_two<T>(pair, two[0], two[1]);                                                         \
    return largest_magnitude(two);                                                               \
  }
LARGEST_MAGNITUDE(__half, "f16x2")
LARGEST_MAGNITUDE(__nv_bfloat16, "bf16x2")
#endif

// The largest among all threads of a warp.
__device__ inline uint32 largest_of_warp(uint32 largest) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, largest);
#else
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  return largest;
#endif
}

// The absmax of a block, from its bits: any NaN becomes the one NaN.
__device__ inline float absmax_from(uint32 bits) { return __uint_as_float(bits > kInfinityBits ? 0x7fc00000u : bits); }

// 1 / absmax, correctly rounded. 0 where the absmax is not finite: all elements then take the code of 0.
__device__ inline float scale_from(uint32 bits) {
  return bits >= kInfinityBits ? 0.0f : __frcp_rn(__uint_as_float(max(bits, kFloorBits)));
}

// The same without the cases that a division has besides, for 2^-126 <= absmax < 2^125.
__device__ inline float reciprocal(float absmax) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(absmax));
  return fmaf(estimate, -fmaf(absmax, estimate, -1.0f), estimate);
}
