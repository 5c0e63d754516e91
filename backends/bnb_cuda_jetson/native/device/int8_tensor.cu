// int8_matmul and int8_linear on tensor cores (sm_80 and up): exact sums in int32.
//
// A block makes 64 or 128 outputs of 64 or 16 rows. Codes come through shared memory, 128 of each line at a time, kStages of them
// ahead. A product of tiles has the weight on its left: its rows are outputs, and its columns are rows of x.
#include "copy_ahead.cuh"
#include "int8_linear.cuh"
#include "mma.cuh"

#if __CUDA_ARCH__ >= 800
constexpr int kThreads = 256;
constexpr int kDepth = 128;  // codes of a line that are multiplied at a time
constexpr int kStages = 3;

extern __shared__ uint4 shared[];

// Lines of 128 codes. In odd ones the halves are exchanged, so that lanes that read two lines meet in no bank.
__device__ inline uint4* chunk(uint4* lines, int line, int number) { return lines + line * (kDepth / 16) + (number ^ line % 2 * 4); }

// products[i][j]: of row 8 * (i / 2) + 2t + i % 2 of the warp's, and output g + 8 * j of its 16.
template <int kOutputWarps, int kRowTiles>
struct Tile {
  static constexpr int kOutputs = 16 * kOutputWarps;
  static constexpr int kRowWarps = kThreads / 32 / kOutputWarps;
  static constexpr int kRows = 8 * kRowTiles * kRowWarps;
  static constexpr int kLines = kOutputs + kRows;

  int products[2 * kRowTiles][2];
  int64 rows[2 * kRowTiles];
  int64 outputs[2];

  __device__ void multiply(const int8* x, const int8* codes, int64 row_count, int64 N, int64 K) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first_output = warp % kOutputWarps * 16, first_row = warp / kOutputWarps * 8 * kRowTiles;
    const int64 block_output = int64(blockIdx.x) * kOutputs, block_row = int64(blockIdx.y) * kRows;
    const auto ask = [&](int stage, int64 k) {
      uint4* const lines = shared + stage % kStages * kLines * (kDepth / 16);
      for (int i = threadIdx.x; i < kLines * (kDepth / 16); i += kThreads) {
        const int line = i / (kDepth / 16), number = i % (kDepth / 16);
        // Lines beyond the last are not used; what lies beyond the last column must be zero on one side only.
        const int8* const from = line < kOutputs ? codes + min(block_output + line, N - 1) * K
                                                 : x + min(block_row + line - kOutputs, row_count - 1) * K;
        if (k + number * 16 < K) {
          copy_ahead<16>(chunk(lines, line, number), from + k + number * 16);
        } else {
          *chunk(lines, line, number) = make_uint4(0, 0, 0, 0);
        }
      }
    };
    int sums[kRowTiles][4] = {};
    const int steps = int((K + kDepth - 1) / kDepth);
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) ask(step, int64(step) * kDepth);
      end_copies();
    }
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      if (step + kStages - 1 < steps) ask(step + kStages - 1, int64(step + kStages - 1) * kDepth);
      end_copies();
      uint4* const lines = shared + step % kStages * kLines * (kDepth / 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 a0 = *chunk(lines, first_output + g, half * 4 + t), a8 = *chunk(lines, first_output + g + 8, half * 4 + t);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          const uint4 b = *chunk(lines, kOutputs + first_row + 8 * i + g, half * 4 + t);
          multiply_tile(sums[i], {a0.x, a8.x, a0.y, a8.y}, b.x, b.y);
          multiply_tile(sums[i], {a0.z, a8.z, a0.w, a8.w}, b.z, b.w);
        }
      }
    }
    for (int j = 0; j < 2; ++j) outputs[j] = block_output + first_output + g + 8 * j;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      rows[i] = block_row + first_row + 8 * (i / 2) + 2 * t + i % 2;
      products[i][0] = sums[i / 2][i % 2];
      products[i][1] = sums[i / 2][2 + i % 2];
    }
  }
};

template <class Tile>
__device__ void matmul(int* y, const int8* a, const int8* b, int64 rows, int64 N, int64 K) {
  Tile tile;
  tile.multiply(a, b, rows, N, K);
#pragma unroll
  for (int i = 0; i < Tile::kRows / Tile::kRowWarps / 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (tile.rows[i] < rows && tile.outputs[j] < N) y[tile.rows[i] * N + tile.outputs[j]] = tile.products[i][j];
    }
  }
}

template <class Tile, class T>
__device__ void linear_tensor(const Int8Linear<T>& linear, const int8* x_codes) {
  Tile tile;
  tile.multiply(x_codes, linear.codes, linear.rows, linear.N, linear.K);
  finish_linear(linear, tile.products, tile.rows, tile.outputs);
}

using ManyRows = Tile<4, 4>;  // 64 outputs of 64 rows
using FewRows = Tile<8, 2>;   // 128 outputs of 16 rows

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    int8_matmul_many(int* y, const int8* a, const int8* b, int64 rows, int64 N, int64 K) {
  matmul<ManyRows>(y, a, b, rows, N, K);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    int8_matmul_few(int* y, const int8* a, const int8* b, int64 rows, int64 N, int64 K) {
  matmul<FewRows>(y, a, b, rows, N, K);
}

#define TENSOR(name, T)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) int8_linear_many_##name(Int8Linear<T> linear, const int8* x_codes) { \
    linear_tensor<ManyRows>(linear, x_codes);                                                                                    \
  }                                                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) int8_linear_few_##name(Int8Linear<T> linear, const int8* x_codes) {  \
    linear_tensor<FewRows>(linear, x_codes);                                                                                     \
  }

TENSOR(float32, float)
TENSOR(float16, __half)
TENSOR(bfloat16, __nv_bfloat16)
#endif
