// Panels of a 4-bit weight, dequantized to bfloat16 for a matrix product of torch's.
#include "weight_4bit.cuh"

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = 4;

// Rows `first_row` and on, columns `first_column` and on, to out[rows][columns]. K and both column numbers are multiples of 8, so that
// eight elements share a scale.
extern "C" __global__ void __launch_bounds__(kThreads)
    gemm_4bit_panel(__nv_bfloat16* out, Weight4bit weight, int64 first_row, int64 rows, int64 first_column, int64 columns) {
  __shared__ float entries[16];
  if (threadIdx.x < 16) entries[threadIdx.x] = weight.codebook[threadIdx.x];
  __syncthreads();
  const int64 column = (int64(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (column >= columns) return;
  for (int64 start = blockIdx.y; start < rows; start += kRowsAtOnce * gridDim.y) {
    uint32 codes[kRowsAtOnce];
    float scales[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {  // all loads before the first store
      const int64 row = min(start + i * int64(gridDim.y), rows - 1);
      const int64 element = (first_row + row) * weight.K + first_column + column;
      codes[i] = __ldg(reinterpret_cast<const uint32*>(weight.packed + element / 2));
      scales[i] = weight.scales[weight.first_block + (element >> weight.blocksize_shift)];
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int64 row = start + i * int64(gridDim.y);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = __fmul_rn(entries[codes[i] >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15], scales[i]);
      if (row < rows) store_eight(out + row * columns + column, values);
    }
  }
}
