// gemm_4bit of float16 on tensor cores, for devices before sm_80: from sm_72 on.
//
// A block multiplies kTokens rows of x by 128 rows of W, 64 columns at a time: a stage, of which a row of W has one scale. While a stage is
// multiplied, codes, scales and x of the next are on their way to registers; codes become values in shared memory. A stage's sums are
// scaled in float32: values times scales might overflow in float16.
#include "pair_table.cuh"
#include "weight_4bit.cuh"
#include "wmma.cuh"

constexpr int kThreads = 256;
constexpr int kRows = 128;  // of W
constexpr int kDepth = 64;

// A warp has kRowTiles tiles of rows of W, and kTokenTiles of rows of x.
template <int kTokens, int kRowTiles, int kTokenTiles>
__device__ void multiply_wmma(__half* y, const __half* x, const Weight4bit& weight, const __half* bias, int64 M) {
  using Table = PairTable<__half>;
  using Values = Planes<__half, kRows, kDepth>;
  using Tokens = Planes<__half, kTokens, kDepth>;
  constexpr int kRowWarps = kRows / 16 / kRowTiles;
  constexpr int kStageBytes = Values::kBytes + Tokens::kBytes + kRows * 4;
  constexpr int kCopies = (kTokens * kDepth / 8 + kThreads - 1) / kThreads;  // of 16 bytes of x
  static_assert(kThreads / 32 / kRowWarps * kTokenTiles * 16 == kTokens, "warps");
  const int thread = threadIdx.x, warp = thread / 32, first_row = warp % kRowWarps * kRowTiles * 16;
  const int first_token = warp / kRowWarps * kTokenTiles * 16;
  const int64 N = weight.N, K = weight.K, block_row = int64(blockIdx.x) * kRows, block_token = int64(blockIdx.y) * kTokens;
  char* const stages = reinterpret_cast<char*>(shared + Table::kWords);
  const auto values_of = [&](int stage) { return Values{reinterpret_cast<__half*>(stages + stage * kStageBytes)}; };
  const auto tokens_of = [&](int stage) { return Tokens{reinterpret_cast<__half*>(stages + stage * kStageBytes + Values::kBytes)}; };
  const auto scales_of = [&](int stage) {
    return reinterpret_cast<float*>(stages + stage * kStageBytes + Values::kBytes + Tokens::kBytes);
  };

  // Each thread brings 32 codes of a row, the scale of a row, and 16 bytes of kCopies rows of x. Beyond the last row it brings that one
  // again: what comes of it is not stored.
  const int code_row = thread / 2, code_column = thread % 2 * 32;
  const uint8* codes_from = weight.packed + (min(block_row + code_row, N - 1) * K + code_column) / 2;
  int64 scale_element = min(block_row + thread % kRows, N - 1) * K + (weight.first_block << weight.blocksize_shift);
  const __half* tokens_from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    tokens_from[i] = x + min(block_token + (thread + i * kThreads) / 8, M - 1) * K + thread % 8 * 8;
  }
  const bool brings_token = kTokens * kDepth / 8 >= kThreads || thread < kTokens * kDepth / 8;
  uint4 codes, tokens[kCopies];
  float scale;
  const auto read = [&] {
    codes = __ldg(reinterpret_cast<const uint4*>(codes_from));
    codes_from += kDepth / 2;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (brings_token) tokens[i] = __ldg(reinterpret_cast<const uint4*>(tokens_from[i]));
      tokens_from[i] += kDepth;
    }
    if (thread < kRows) scale = weight.scales[scale_element >> weight.blocksize_shift];
    scale_element += kDepth;
  };
  const uint32 table = Table::address();
  const auto write = [&](int stage) {
    const Values to = values_of(stage);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = i ^ thread % 2;  // neighbours in turn, so that they meet in no bank
      const uint32 word = j < 2 ? (j ? codes.y : codes.x) : (j == 2 ? codes.z : codes.w);
      to.bytes_at(code_row, code_column + 8 * j) = make_uint4(Table::look_up(table, word, 0), Table::look_up(table, word, 1),
                                                              Table::look_up(table, word, 2), Table::look_up(table, word, 3));
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (brings_token) tokens_of(stage).bytes_at((thread + i * kThreads) / 8, thread % 8 * 8) = tokens[i];
    }
    if (thread < kRows) scales_of(stage)[thread] = scale;
  };

  read();
  Table::fill(weight.codebook);
  __syncthreads();
  write(0);
  Sums<float> totals[kTokenTiles][kRowTiles];
#pragma unroll
  for (int i = 0; i < kTokenTiles * kRowTiles; ++i) wmma::fill_fragment(totals[i / kRowTiles][i % kRowTiles], 0.0f);
  int stage = 0;
  for (int64 k = 0; k < K; k += kDepth, stage ^= 1) {
    if (k + kDepth < K) read();
    __syncthreads();  // the stage is written, and none still reads the other
    Sums<float> sums[kTokenTiles][kRowTiles];
#pragma unroll
    for (int i = 0; i < kTokenTiles * kRowTiles; ++i) wmma::fill_fragment(sums[i / kRowTiles][i % kRowTiles], 0.0f);
#pragma unroll
    for (int plane = 0; plane < kDepth / 16; ++plane) {
      LeftTile<__half> left[kTokenTiles];
      RightTile<__half> right[kRowTiles];
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) tokens_of(stage).load(left[i], first_token + 16 * i, plane);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) values_of(stage).load(right[i], first_row + 16 * i, plane);
#pragma unroll
      for (int i = 0; i < kTokenTiles * kRowTiles; ++i) {
        Sums<float>& sum = sums[i / kRowTiles][i % kRowTiles];
        wmma::mma_sync(sum, left[i / kRowTiles], right[i % kRowTiles], sum);
      }
    }
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      Sums<float> scales;  // the same for each row of x: lines that are no distance apart
      wmma::load_matrix_sync(scales, scales_of(stage) + first_row + 16 * j, 0, wmma::mem_row_major);
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int e = 0; e < scales.num_elements; ++e) totals[i][j].x[e] = fmaf(sums[i][j].x[e], scales.x[e], totals[i][j].x[e]);
      }
    }
    if (k + kDepth < K) write(stage ^ 1);
  }

  constexpr int kPitch = kRows + 4;
  float* const sums = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokenTiles * kRowTiles; ++i) {
    float* const tile = sums + (first_token + i / kRowTiles * 16) * kPitch + first_row + i % kRowTiles * 16;
    wmma::store_matrix_sync(tile, totals[i / kRowTiles][i % kRowTiles], kPitch, wmma::mem_row_major);
  }
  __syncthreads();
  const int64 row = block_row + thread % kRows;
  if (row >= N) return;
  const float added = bias ? to_float(bias[row]) : 0.0f;
  for (int token = thread / kRows; token < kTokens && block_token + token < M; token += kThreads / kRows) {
    y[(block_token + token) * N + row] = from_float<__half>(sums[token * kPitch + thread % kRows] + added);
  }
}

// Shared memory and threads of each kernel: native/host/gemm_4bit.cpp has the same numbers.
#define WMMA(tokens, ...)                                                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                                   \
      gemm_4bit_wmma##tokens(__half* y, const __half* x, Weight4bit weight, const __half* bias, int64 M) {    \
    multiply_wmma<tokens, __VA_ARGS__>(y, x, weight, bias, M);                                                \
  }

WMMA(16, 1, 1)
WMMA(32, 1, 2)
WMMA(64, 2, 2)
