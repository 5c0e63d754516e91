// int8_matmul and int8_linear on tensor cores, for devices before sm_80: from sm_72 on. Exact sums in int32.
//
// A block makes 128 outputs of 64 or 16 rows, 64 columns at a time: a stage. While one is multiplied, the next is on its way to registers.
#include "int8_linear.cuh"
#include "wmma.cuh"

constexpr int kThreads = 256;
constexpr int kOutputs = 128;
constexpr int kDepth = 64;

extern __shared__ uint4 shared[];

// A warp has kOutputTiles tiles of outputs, and kRowTiles of rows.
template <int kRows_, int kOutputTiles, int kRowTiles>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kOutputWarps = kOutputs / 16 / kOutputTiles;
  static constexpr int kLines = kOutputs + kRows;  // of a stage: of the weight, then of x
  static constexpr int kCopies = (kLines * kDepth / 16 + kThreads - 1) / kThreads;
  static_assert(kThreads / 32 / kOutputWarps * kRowTiles * 16 == kRows, "warps");
  using Lines = Planes<signed char, kLines, kDepth>;

  // products[i][j]: of row rows[i] and output outputs[j].
  int products[kRows / 16][kOutputs / 16];
  int64 rows[kRows / 16];
  int64 outputs[kOutputs / 16];

  __device__ void multiply(const int8* x, const int8* codes, int64 row_count, int64 N, int64 K) {
    const int thread = threadIdx.x, warp = thread / 32, number = thread % (kDepth / 16);
    const int first_output = warp % kOutputWarps * kOutputTiles * 16, first_row = warp / kOutputWarps * kRowTiles * 16;
    const int64 block_output = int64(blockIdx.x) * kOutputs, block_row = int64(blockIdx.y) * kRows;
    const auto lines_of = [&](int stage) {
      return Lines{reinterpret_cast<signed char*>(shared) + stage * Lines::kBytes};
    };

    // Each thread brings 16 codes of kCopies lines. Beyond the last output or row it brings that one again: what comes of it is not used.
    const auto line_of = [&](int i) { return (thread + i * kThreads) / (kDepth / 16); };
    const int8* from[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int line = line_of(i);
      from[i] = (line < kOutputs ? codes + min(block_output + line, N - 1) * K
                                 : x + min(block_row + line - kOutputs, row_count - 1) * K) + number * 16;
    }
    uint4 words[kCopies];
    const auto read = [&](int64 k) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        words[i] = k + number * 16 < K ? __ldg(reinterpret_cast<const uint4*>(from[i] + k)) : make_uint4(0, 0, 0, 0);
      }
    };
    const auto write = [&](int stage) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (kLines * kDepth / 16 % kThreads == 0 || line_of(i) < kLines) lines_of(stage).bytes_at(line_of(i), number * 16) = words[i];
      }
    };

    read(0);
    write(0);
    Sums<int> sums[kRowTiles][kOutputTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles * kOutputTiles; ++i) wmma::fill_fragment(sums[i / kOutputTiles][i % kOutputTiles], 0);
    int stage = 0;
    for (int64 k = 0; k < K; k += kDepth, stage ^= 1) {
      if (k + kDepth < K) read(k + kDepth);
      __syncthreads();  // the stage is written, and none still reads the other
#pragma unroll
      for (int plane = 0; plane < kDepth / 16; ++plane) {
        LeftTile<signed char> left[kRowTiles];
        RightTile<signed char> right[kOutputTiles];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) lines_of(stage).load(left[i], kOutputs + first_row + 16 * i, plane);
#pragma unroll
        for (int i = 0; i < kOutputTiles; ++i) lines_of(stage).load(right[i], first_output + 16 * i, plane);
#pragma unroll
        for (int i = 0; i < kRowTiles * kOutputTiles; ++i) {
          Sums<int>& sum = sums[i / kOutputTiles][i % kOutputTiles];
          wmma::mma_sync(sum, left[i / kOutputTiles], right[i % kOutputTiles], sum);
        }
      }
      if (k + kDepth < K) write(stage ^ 1);
    }

    constexpr int kPitch = kOutputs + 4;
    int* const all = reinterpret_cast<int*>(shared);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowTiles * kOutputTiles; ++i) {
      int* const tile = all + (first_row + i / kOutputTiles * 16) * kPitch + first_output + i % kOutputTiles * 16;
      wmma::store_matrix_sync(tile, sums[i / kOutputTiles][i % kOutputTiles], kPitch, wmma::mem_row_major);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOutputs / 16; ++j) outputs[j] = block_output + thread % 16 + 16 * j;
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      rows[i] = block_row + thread / 16 + 16 * i;
#pragma unroll
      for (int j = 0; j < kOutputs / 16; ++j) products[i][j] = all[(thread / 16 + 16 * i) * kPitch + thread % 16 + 16 * j];
    }
  }
};

template <class Tile>
__device__ void matmul(int* y, const int8* a, const int8* b, int64 rows, int64 N, int64 K) {
  Tile tile;
  tile.multiply(a, b, rows, N, K);
#pragma unroll
  for (int i = 0; i < Tile::kRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kOutputs / 16; ++j) {
      if (tile.rows[i] < rows && tile.outputs[j] < N) y[tile.rows[i] * N + tile.outputs[j]] = tile.products[i][j];
    }
  }
}

template <class Tile, class T>
__device__ void linear_wmma(const Int8Linear<T>& linear, const int8* x_codes) {
  Tile tile;
  tile.multiply(x_codes, linear.codes, linear.rows, linear.N, linear.K);
  finish_linear(linear, tile.products, tile.rows, tile.outputs);
}

using ManyRows = Tile<64, 2, 2>;
using FewRows = Tile<16, 1, 1>;

// Shared memory and threads of each kernel: native/host/int8.cpp has the same numbers.
#define WMMA(name, T)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) int8_linear_wmma_many_##name(Int8Linear<T> linear, const int8* x_codes) { \
    linear_wmma<ManyRows>(linear, x_codes);                                                                                          \
  }                                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) int8_linear_wmma_few_##name(Int8Linear<T> linear, const int8* x_codes) {  \
    linear_wmma<FewRows>(linear, x_codes);                                                                                           \
  }

WMMA(float32, float)
WMMA(float16, __half)
WMMA(bfloat16, __nv_bfloat16)

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    int8_matmul_wmma_many(int* y, const int8* a, const int8* b, int64 rows, int64 N, int64 K) {
  matmul<ManyRows>(y, a, b, rows, N, K);
}
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    int8_matmul_wmma_few(int* y, const int8* a, const int8* b, int64 rows, int64 N, int64 K) {
  matmul<FewRows>(y, a, b, rows, N, K);
}
