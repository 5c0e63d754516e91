// What follows an integer product in LLM.int8(): scales, outlier columns and bias.
#pragma once

#include "int8_quantize.cuh"

// The same struct as in native/host/int8.cpp.
template <class T>
struct Int8Linear {
  T* y;                     // [rows, N]
  const T* x;               // [rows, K]
  const float* row_absmax;  // [rows], of x
  const int8* codes;        // [N, K]
  const float* absmax;      // [N]
  const bool* mask;         // [K], outlier columns; null where there is no threshold
  const T* bias;            // [N] or null
  int64 rows;
  int64 N;
  int64 K;

  __device__ float scaled(int product, int64 row, int64 output) const {
    return static_cast<float>(product) * (row_absmax[row] * (1.0f / (127.0f * 127.0f))) * absmax[output];
  }
  __device__ void store(float value, int64 row, int64 output) const {
    y[row * N + output] = from_float<T>(bias ? value + to_float(bias[output]) : value);
  }
};

// Scale the products that a thread has, of kRows rows and kOutputs outputs, add the outlier columns, and store them.
// Blocks are of 256 threads. Rows and outputs from the last on are left out.
template <int kRows, int kOutputs, class T>
__device__ void finish_linear(const Int8Linear<T>& linear, const int (&products)[kRows][kOutputs], const int64 (&rows)[kRows],
                              const int64 (&outputs)[kOutputs]) {
  float values[kRows][kOutputs];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const bool inside = rows[i] < linear.rows && outputs[j] < linear.N;
      values[i][j] = inside ? linear.scaled(products[i][j], rows[i], outputs[j]) : 0.0f;
    }
  }
  if (linear.mask) {
    __shared__ int columns[256];
    __shared__ int counts[8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int64 start = 0; start < linear.K; start += 256) {  // list the outliers among 256 columns, in order
      const bool outlier = start + threadIdx.x < linear.K && linear.mask[start + threadIdx.x];
      const uint32 votes = __ballot_sync(~0u, outlier);
      __syncthreads();  // the last list is read
      if (lane == 0) counts[warp] = __popc(votes);
      __syncthreads();
      int before = 0, count = 0;
      for (int i = 0; i < 8; ++i) {
        before += i < warp ? counts[i] : 0;
        count += counts[i];
      }
      if (outlier) columns[before + __popc(votes & ((1u << lane) - 1))] = threadIdx.x;
      __syncthreads();
      for (int at = 0; at < count; ++at) {
        const int64 k = start + columns[at];
        float weights[kOutputs];
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) {
          const bool inside = outputs[j] < linear.N;
          weights[j] = inside ? linear.codes[outputs[j] * linear.K + k] * (linear.absmax[outputs[j]] * (1.0f / 127.0f)) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float value = rows[i] < linear.rows ? to_float(linear.x[rows[i] * linear.K + k]) : 0.0f;
#pragma unroll
          for (int j = 0; j < kOutputs; ++j) values[i][j] = fmaf(value, weights[j], values[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      if (rows[i] < linear.rows && outputs[j] < linear.N) linear.store(values[i][j], rows[i], outputs[j]);
    }
  }
}

// Four products of int8, summed up. Written out: the 11.8 compiler has no __dp4a.
__device__ inline int dot_four(uint32 a, uint32 b, int sum) {
  asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return sum;
}
