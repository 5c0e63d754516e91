// Quantization to int8, element by element.
#pragma once

#include "floats.cuh"

using int8 = signed char;

constexpr float kAbsmaxFloor = 7.52316384526264e-37f;  // 2^-120: 127 over it is finite

// Magnitudes as integers compare like numbers, but that NaN is the largest: so a NaN makes the maximum NaN.
__device__ inline uint32 magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffff; }

// What a block's quantization sees of an element: 0 for what reaches the threshold, and for NaN where there is one.
__device__ inline float below(float x, float threshold) { return threshold == 0.0f || fabsf(x) < threshold ? x : 0.0f; }

__device__ inline float quantization_scale(float absmax) {
  return __fdiv_rn(127.0f, absmax < kAbsmaxFloor ? kAbsmaxFloor : absmax);  // NaN stays NaN
}

__device__ inline int8 quantize(float x, float scale) {
  const float code = rintf(__fmul_rn(x, scale));
  return isnan(code) ? 0 : static_cast<int8>(code);
}

// The largest of the values of a block's kThreads threads, to all of them.
template <int kThreads>
__device__ inline uint32 block_maximum(uint32 value) {
  __shared__ uint32 warps[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value = max(value, __shfl_xor_sync(~0u, value, offset));
  __syncthreads();  // the last call's are read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) value = max(value, warps[i]);
  return value;
}

