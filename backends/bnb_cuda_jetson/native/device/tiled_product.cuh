// Products of any shape and alignment in float32: x[M][C] times a dequantized weight, by tiles in shared memory.
#pragma once

#include "floats.cuh"

constexpr int kTileRows = 32;      // of x
constexpr int kTileOutputs = 64;   // columns of the product
constexpr int kTileTerms = 32;     // that are summed over at a time
constexpr int kTileThreads = 256;  // 16 by 16, each with 2 rows and 4 outputs

// y = x W^T + bias for a weight W[outputs][terms], or y = x W for W[terms][outputs] where kTransposed. first_row, first_output: of this
// block's tile. bias: may be null. Weight has `value(row, column)`.
template <bool kTransposed, class T, class Weight>
__device__ void multiply_tile_of_any_shape(T* y, const T* x, const Weight& weight, const T* bias, int64 rows, int64 outputs, int64 terms,
                                           int64 first_row, int64 first_output) {
  __shared__ float left[kTileTerms][kTileRows + 1];
  __shared__ float right[kTileTerms][kTileOutputs + 1];
  const int across = threadIdx.x % 16, down = threadIdx.x / 16;
  float sums[2][4] = {};
  for (int64 first_term = 0; first_term < terms; first_term += kTileTerms) {
    for (int i = threadIdx.x; i < kTileRows * kTileTerms; i += kTileThreads) {
      const int row = i / kTileTerms, term = i % kTileTerms;
      const bool inside = first_row + row < rows && first_term + term < terms;
      left[term][row] = inside ? to_float(x[(first_row + row) * terms + first_term + term]) : 0.0f;
    }
    for (int i = threadIdx.x; i < kTileOutputs * kTileTerms; i += kTileThreads) {
      const int output = kTransposed ? i % kTileOutputs : i / kTileTerms, term = kTransposed ? i / kTileOutputs : i % kTileTerms;
      const int64 o = first_output + output, c = first_term + term;
      right[term][output] = o < outputs && c < terms ? (kTransposed ? weight.value(c, o) : weight.value(o, c)) : 0.0f;
    }
    __syncthreads();
    const int count = int(min(int64(kTileTerms), terms - first_term));  // no more: 0 times an infinite element would be NaN
    for (int term = 0; term < count; ++term) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& sum = sums[i / 4][i % 4];
        sum = fmaf(left[term][down + i / 4 * 16], right[term][across + i % 4 * 16], sum);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64 row = first_row + down + i / 4 * 16, output = first_output + across + i % 4 * 16;
    if (row < rows && output < outputs) {
      const float sum = sums[i / 4][i % 4] + (bias ? to_float(bias[output]) : 0.0f);
      y[row * outputs + output] = from_float<T>(sum);
    }
  }
}
