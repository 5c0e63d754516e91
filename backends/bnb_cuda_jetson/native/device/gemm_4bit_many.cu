// gemm_4bit for many rows of x, on tensor cores (sm_80 and up).
//
// A block multiplies 128 rows of W by kTokens rows of x. Codes, scales and x come through shared memory, 128 columns at a time,
// kStages of them ahead. Half of the warps take the first 64 of these columns, half the others; a warp has 16 rows of W, whose codes
// become values in registers on the way to the tensor cores, each once. Sums of 64 columns, which have one scale, are scaled in
// float32. Where N alone makes too few blocks, several share the columns: each writes its sums, and a second kernel adds them up.
#include "copy_ahead.cuh"
#include "mma.cuh"
#include "pair_table.cuh"
#include "weight_4bit.cuh"

#if __CUDA_ARCH__ >= 800
constexpr int kThreads = 512;
constexpr int kRows = 128;  // of W
constexpr int kDepth = 128;
constexpr int kStages = 4;

template <class T, int kTokens>
struct Stage {
  uint8 codes[kRows][kDepth / 2];
  float scales[2][kRows];
  uint32 scale_words[2][kRows];  // of nested scales: words that hold their codes
  T x[kTokens][kDepth];

  // Where 16 bytes are: so exchanged that the lanes that read together meet in no bank.
  __device__ uint8* codes_at(int row, int byte) { return &codes[row][byte ^ (row / 2 % 2 * 32)]; }
  __device__ T* x_at(int token, int column) { return &x[token][column ^ (token % 2 * 8)]; }
};

template <class T, int kTokens>
__device__ void multiply_many(T* y, float* partial_sums, const T* x, const Weight4bit& weight, const T* bias, int64 M, int stages_each) {
  using Stage = Stage<T, kTokens>;
  constexpr int kTiles = kTokens / 8;
  Stage* const stages = reinterpret_cast<Stage*>(shared + PairTable<T>::kWords);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int half = warp / 8, first_row = warp % 8 * 16;
  const int64 N = weight.N, block_row = int64(blockIdx.x) * kRows, block_token = int64(blockIdx.y) * kTokens;
  const int K = int(weight.K), begin = int(blockIdx.z) * stages_each * kDepth, end = min(K, begin + stages_each * kDepth);

  // Each thread copies 16 bytes of codes and of kCopies rows of x. What lies beyond the last row is not stored.
  constexpr int kCopies = kTokens * kDepth / 8 / kThreads;
  const int codes_row = threadIdx.x / 4, codes_byte = threadIdx.x % 4 * 16, x_row = threadIdx.x / 16, x_column = threadIdx.x % 16 * 8;
  const uint8* const codes_from = weight.packed + min(block_row + codes_row, N - 1) * (K / 2) + codes_byte;
  const T* x_from[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) x_from[i] = x + min(block_token + x_row + i * (kThreads / 16), M - 1) * K + x_column;
  // Half of the threads copy the scale of one row and half of the columns each; of a nested scale its group's, and its code.
  const Scales& all = weight.scales;
  const int scale_half = threadIdx.x / kRows, scale_row = threadIdx.x % kRows;
  const int64 scale_element = min(block_row + scale_row, N - 1) * K + scale_half * 64;
  const auto block_of = [&](int k) { return weight.first_block + ((scale_element + k) >> weight.blocksize_shift); };
  const auto has_scale = [&](int k) { return scale_half < 2 && k + scale_half * 64 < end; };

  const auto ask = [&](int number, int k) {
    Stage& stage = stages[number % kStages];
    if (k + 2 * codes_byte < end) copy_ahead<16>(stage.codes_at(codes_row, codes_byte), codes_from + k / 2);
    if (k + x_column < end) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) copy_ahead<16>(stage.x_at(x_row + i * (kThreads / 16), x_column), x_from[i] + k);
    }
    if (has_scale(k)) {
      const int64 block = block_of(k);
      float* const to = &stage.scales[scale_half][scale_row];
      if (all.nested_absmax) {
        const size_t code = reinterpret_cast<size_t>(all.absmax) + block;
        copy_ahead<4>(&stage.scale_words[scale_half][scale_row], reinterpret_cast<const void*>(code & ~size_t(3)));
        copy_ahead<4>(to, all.nested_absmax + (block >> all.nested_shift));
      } else {
        copy_ahead<4>(to, static_cast<const float*>(all.absmax) + block);
      }
    }
  };
  // Turn what this thread copied of a nested scale into the scale.
  const auto settle = [&](int number, int k) {
    if (!all.nested_absmax || !has_scale(k)) return;
    Stage& stage = stages[number % kStages];
    const uint32 byte = uint32(reinterpret_cast<size_t>(all.absmax) + block_of(k)) & 3;
    const uint32 code = stage.scale_words[scale_half][scale_row] >> 8 * byte & 255;
    float& scale = stage.scales[scale_half][scale_row];
    scale = __fadd_rn(__fmul_rn(__ldg(all.nested_codebook + code), scale), __ldg(all.nested_offset));
  };

  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i * kDepth < end) ask(i, begin + i * kDepth);
    end_copies();
  }
  PairTable<T>::fill(weight.codebook);
  const uint32 table = PairTable<T>::address();
  float totals[kTiles][4] = {};
  int number = 0;
  for (int k = begin; k < end; k += kDepth, ++number) {
    wait_for_copies<kStages - 2>();
    settle(number, k);
    __syncthreads();
    if (k + (kStages - 1) * kDepth < end) ask(number + kStages - 1, k + (kStages - 1) * kDepth);
    end_copies();
    if (k + half * 64 >= end) continue;
    Stage& stage = stages[number % kStages];
    float sums[kTiles][4] = {};
    const uint2 codes0 = *reinterpret_cast<const uint2*>(stage.codes_at(first_row + g, half * 32) + t * 8);
    const uint2 codes8 = *reinterpret_cast<const uint2*>(stage.codes_at(first_row + 8 + g, half * 32) + t * 8);
#pragma unroll
    for (int j = 0; j < 2; ++j) {  // eight columns of each lane t
      uint32 a[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) PairTable<T>::fragment(a[step], table, j ? codes0.y : codes0.x, j ? codes8.y : codes8.x, step);
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {  // two at a time: a product need not wait for the one before
        const uint4 b[2] = {*reinterpret_cast<const uint4*>(stage.x_at(8 * i + g, half * 64 + t * 16 + j * 8)),
                            *reinterpret_cast<const uint4*>(stage.x_at(8 * i + 8 + g, half * 64 + t * 16 + j * 8))};
        multiply_tile<T>(sums[i], a[0], b[0].x, b[0].y);
        multiply_tile<T>(sums[i + 1], a[0], b[1].x, b[1].y);
        multiply_tile<T>(sums[i], a[1], b[0].z, b[0].w);
        multiply_tile<T>(sums[i + 1], a[1], b[1].z, b[1].w);
      }
    }
    const float low = stage.scales[half][first_row + g], high = stage.scales[half][first_row + 8 + g];
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) totals[i / 4][i % 4] = fmaf(sums[i / 4][i % 4], i % 4 < 2 ? low : high, totals[i / 4][i % 4]);
  }

  // Add up the two halves of the columns.
  wait_for_copies<0>();
  __syncthreads();
  float* const others = reinterpret_cast<float*>(stages) + threadIdx.x % (kThreads / 2);
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    if (half) others[i * (kThreads / 2)] = totals[i / 4][i % 4];
  }
  __syncthreads();
  if (half) return;
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    const float sum = totals[i / 4][i % 4] + others[i * (kThreads / 2)];
    const int64 row = block_row + first_row + g + i % 4 / 2 * 8, token = block_token + i / 4 * 8 + 2 * t + i % 2;
    if (row >= N || token >= M) continue;
    if (partial_sums) {
      partial_sums[(blockIdx.z * M + token) * N + row] = sum;
    } else {
      y[token * N + row] = from_float<T>(bias ? sum + to_float(bias[row]) : sum);
    }
  }
}

template <class T>
__device__ void add_partial_sums(T* y, const float* partial_sums, const T* bias, int64 M, int64 N, int parts) {
  for (int64 i = int64(blockIdx.x) * kThreads + threadIdx.x; i < M * N; i += int64(gridDim.x) * kThreads) {
    float sum = partial_sums[i];
    for (int part = 1; part < parts; ++part) sum += partial_sums[part * M * N + i];
    y[i] = from_float<T>(bias ? sum + to_float(bias[i % N]) : sum);
  }
}

#define MANY_TOKENS(name, T, tokens, blocks)                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, blocks)                                                          \
      gemm_4bit_many##tokens##_##name(T* y, float* partial_sums, const T* x, Weight4bit weight, const T* bias, int64 M,   \
                                      int stages_each) {                                                                  \
    multiply_many<T, tokens>(y, partial_sums, x, weight, bias, M, stages_each);                                           \
  }
#define MANY(name, T)                                                                                                     \
  MANY_TOKENS(name, T, 32, 1)                                                                                             \
  MANY_TOKENS(name, T, 64, 1)                                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                  \
      gemm_4bit_add_##name(T* y, const float* partial_sums, const T* bias, int64 M, int64 N, int parts) {                 \
    add_partial_sums(y, partial_sums, bias, M, N, parts);                                                                 \
  }

MANY(float16, __half)
MANY(bfloat16, __nv_bfloat16)
#endif
