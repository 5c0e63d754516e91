// gemm_4bit for many rows of x, on tensor cores (sm_80 and up).
//
// A block multiplies 128 rows of W by kTokens rows of x. Codes, scales and x come through shared memory, 128 columns at a time,
// kStages of them ahead. Half of the warps take the first 64 of these columns, half the others; a warp has 32 rows of W, whose codes
// become values in registers on the way to the tensor cores, each once. Sums of 64 columns, which have one scale, are scaled in
// float32. Where N alone makes too few blocks, several share the columns: each writes its sums, and a second kernel adds them up.
#include "copy_ahead.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "weight_4bit.cuh"

#if __CUDA_ARCH__ >= 800
constexpr int kAtOnce = 2;  // tiles of eight rows of x that a warp multiplies at a time: a product need not wait for the one before
constexpr int kThreads = 256;
constexpr int kRows = 128;  // of W
constexpr int kDepth = 128;
constexpr int kStages = 3;
constexpr int kRowBytes = kDepth / 2;  // of codes
constexpr int kTokenBytes = kDepth * 2;

// Where the parts of a stage are in shared memory. So exchanged that the lanes that read together meet in no bank: of codes the halves of
// a row, every other two rows; of x 16 bytes and the next 16, every other row.
constexpr uint32 kScalesAt = kRows * kRowBytes;          // [2][kRows], of each half of the columns
constexpr uint32 kScaleWordsAt = kScalesAt + 8 * kRows;  // of nested scales: words that hold their codes
constexpr uint32 kTokensAt = kScaleWordsAt + 8 * kRows;

template <class T, int kTokens, bool kNested>
__device__ void multiply_many(T* y, float* partial_sums, const T* x, const Weight4bit& weight, const T* bias, int64 M, int stages_each) {
  constexpr int kTiles = kTokens / 8;
  // For 128 rows of x there are registers enough on some architectures only.
  constexpr bool kReadAhead = kTokens < 128 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 900;
  constexpr uint32 kStageBytes = kTokensAt + kTokens * kTokenBytes;
  const int thread = keep(int(threadIdx.x)), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int half = warp / 4, first_row = warp % 4 * 32;
  const int64 N = weight.N, block_row = int64(blockIdx.x) * kRows, block_token = int64(blockIdx.y) * kTokens;
  const int K = int(weight.K), begin = int(blockIdx.z) * stages_each * kDepth, end = keep(min(K, begin + stages_each * kDepth));
  const int rows = keep(int(min(N - block_row, int64(kRows)))), tokens = keep(int(min(M - block_token, int64(kTokens))));
  const uint32 stages = keep(shared_address(shared + PairTable<T>::kWords));

  // Each thread copies 16 bytes of codes of two rows, and of kCopies rows of x. What lies beyond the last row is left as it is.
  constexpr int kCopies = kTokens * kTokenBytes / 16 / kThreads;
  const int codes_row = thread / 4, codes_byte = thread % 4 * 16, x_row = thread / 16, x_column = thread % 16 * 8;
  const int codes_end = keep(end - 2 * codes_byte), x_end = keep(end - x_column);
  const uint8* codes_from = weight.packed + (block_row + codes_row) * (K / 2) + codes_byte + begin / 2;
  const T* x_from = x + (block_token + x_row) * K + x_column + begin;
  const int64 codes_stride = keep(int64(32) * K), x_stride = keep(int64(16) * K);
  const uint32 codes_to = keep(codes_row * kRowBytes + (codes_byte ^ (codes_row / 2 % 2 * 32)));
  const uint32 x_to = keep(kTokensAt + x_row * kTokenBytes + (x_column * 2 ^ (x_row % 2 * 16)));
  // And the scale of one row and half of the columns; of a nested scale its group's, and its code.
  const Scales& all = weight.scales;
  const int scale_half = thread / kRows, scale_row = thread % kRows;
  const int scale_end = keep(scale_row < rows ? end - scale_half * 64 : 0);
  const int64 scale_element = keep((weight.first_block << weight.blocksize_shift) + (block_row + scale_row) * K + scale_half * 64);
  const auto block_of = [&](int k) { return (scale_element + k) >> weight.blocksize_shift; };

  const auto ask = [&](uint32 stage, int k) {
    const uint8* codes = codes_from;
#pragma unroll
    for (int i = 0; i < 2; ++i, codes += codes_stride) {
      if (k < codes_end && codes_row + i * 64 < rows) copy_ahead<16>(stage + codes_to + i * 64 * kRowBytes, codes);
    }
    codes_from += kRowBytes;
    const T* tokens_from = x_from;
#pragma unroll
    for (int i = 0; i < kCopies; ++i, tokens_from += x_stride) {
      if (k < x_end && x_row + i * 16 < tokens) copy_ahead<16>(stage + x_to + i * 16 * kTokenBytes, tokens_from);
    }
    x_from += kDepth;
    if (k < scale_end) {
      const int64 block = block_of(k);
      const uint32 to = stage + kScalesAt + thread * 4;
      if (kNested) {
        const size_t code = reinterpret_cast<size_t>(all.absmax) + block;
        copy_ahead<4>(to + kScaleWordsAt - kScalesAt, reinterpret_cast<const void*>(code & ~size_t(3)));
        copy_ahead<4>(to, all.nested_absmax + (block >> all.nested_shift));
      } else {
        copy_ahead<4>(to, static_cast<const float*>(all.absmax) + block);
      }
    }
  };
  // Turn what this thread copied of a nested scale into the scale.
  const auto settle = [&](uint32 stage, int k) {
    if (!kNested || k >= scale_end) return;
    const uint32 at = stage + kScalesAt + thread * 4;
    const uint32 byte = uint32(reinterpret_cast<size_t>(all.absmax) + block_of(k)) & 3;
    const uint32 code = load_shared<uint32>(at + kScaleWordsAt - kScalesAt) >> 8 * byte & 255;
    const float scale = __fadd_rn(__fmul_rn(__ldg(all.nested_codebook + code), load_shared<float>(at)), __ldg(all.nested_offset));
    store_shared(at, scale);
  };

  let_next_begin();
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i * kDepth < end) ask(stages + i * kStageBytes, begin + i * kDepth);
    end_copies();
  }
  PairTable<T>::fill(weight.codebook);
  const uint32 table = keep(PairTable<T>::address());
  const uint32 codes_at = keep((first_row + g) * kRowBytes + ((half * 32 + t * 8) ^ (g / 2 % 2 * 32)));
  const uint32 x_at = keep(kTokensAt + g * kTokenBytes + ((half * 128 + t * 32) ^ (g % 2 * 16)));
  const uint32 scales_at = keep(kScalesAt + (half * kRows + first_row + g) * 4);
  float totals[2][kTiles][4] = {};  // of the first and of the last 16 rows
  uint32 stage = stages, asked = stages + (kStages - 1) * kStageBytes;
  for (int k = begin; k < end; k += kDepth) {
    wait_for_copies<kStages - 2>();
    settle(stage, k);
    __syncthreads();
    const bool inside = k + half * 64 < end;
    uint32 a[2][4][4];
    float scales[2][2];
    uint4 b[2][kAtOnce][2];  // of x: for these tiles, and where there are registers for the next ones
    const auto read_x = [&](int tile) {
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        const uint32 from = stage + (x_at ^ (i % 2 * 16)) + (tile + i / 2) * 8 * kTokenBytes;
        b[kReadAhead ? tile / kAtOnce % 2 : 0][i / 2][i % 2] = load_shared<uint4>(from);
      }
    };
    if (inside) {
      uint2 codes[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i / 2][i % 2] = load_shared<uint2>(stage + codes_at + i * 8 * kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) scales[i / 2][i % 2] = load_shared<float>(stage + scales_at + i * 32);
      if (kReadAhead) read_x(0);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint2 low = codes[i % 2][0], high = codes[i % 2][1];
        PairTable<T>::fragment(a[i % 2][i / 2], table, i < 4 ? low.x : low.y, i < 4 ? high.x : high.y, i / 2 % 2);
      }
    }
    if (k + (kStages - 1) * kDepth < end) ask(asked, k + (kStages - 1) * kDepth);
    end_copies();
    if (inside) {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += kAtOnce) {
        if (!kReadAhead) read_x(tile);
        if (kReadAhead && tile + kAtOnce < kTiles) read_x(tile + kAtOnce);
        float sums[2][kAtOnce][4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 2 * kAtOnce; ++i) {
            const uint4 x8 = b[kReadAhead ? tile / kAtOnce % 2 : 0][i / 2][j / 2];
            multiply_tile<T>(sums[i % 2][i / 2], a[i % 2][j], j % 2 ? x8.z : x8.x, j % 2 ? x8.w : x8.y);
          }
        }
#pragma unroll
        for (int i = 0; i < 8 * kAtOnce; ++i) {
          float& total = totals[i / 4 % 2][tile + i / 8][i % 4];
          total = fmaf(sums[i / 4 % 2][i / 8][i % 4], scales[i / 4 % 2][i % 4 / 2], total);
        }
      }
    }
    stage = stage + kStageBytes < stages + kStages * kStageBytes ? stage + kStageBytes : stages;
    asked = asked + kStageBytes < stages + kStages * kStageBytes ? asked + kStageBytes : stages;
  }

  // Add up the two halves of the columns, in shared memory: rows of x of kPitch numbers, so that lanes meet in no bank.
  constexpr int kPitch = kRows + 4;
  float* const sums = reinterpret_cast<float*>(shared + PairTable<T>::kWords);
  wait_for_copies<0>();
#pragma unroll
  for (int turn = 1; turn >= 0; --turn) {
    __syncthreads();
    if (half != turn) continue;
#pragma unroll
    for (int i = 0; i < 8 * kTiles; ++i) {
      const int at = i % 4;
      float* const sum = sums + (i / 4 % kTiles * 8 + 2 * t + at % 2) * kPitch + first_row + i / (4 * kTiles) * 16 + g + at / 2 * 8;
      *sum = totals[i / (4 * kTiles)][i / 4 % kTiles][at] + (turn ? 0.0f : *sum);
    }
  }
  __syncthreads();
  const int row = threadIdx.x % kRows;
  if (row >= rows) return;
  const float added = bias ? to_float(bias[block_row + row]) : 0.0f;
#pragma unroll 4
  for (int token = threadIdx.x / kRows; token < tokens; token += kThreads / kRows) {
    const float sum = sums[token * kPitch + row];
    const int64 output = (block_token + token) * N + block_row + row;
    if (partial_sums) {
      partial_sums[blockIdx.z * M * N + output] = sum;
    } else {
      y[output] = from_float<T>(sum + added);
    }
  }
}

template <class T>
__device__ void add_partial_sums(T* y, const float* partial_sums, const T* bias, int64 M, int64 N, int parts) {
  let_next_begin();
  wait_for_previous();
  for (int64 i = int64(blockIdx.x) * kThreads + threadIdx.x; i < M * N; i += int64(gridDim.x) * kThreads) {
    float sum = partial_sums[i];
    for (int part = 1; part < parts; ++part) sum += partial_sums[part * M * N + i];
    y[i] = from_float<T>(bias ? sum + to_float(bias[i % N]) : sum);
  }
}

#define MANY_TOKENS(name, T, tokens, nested)                                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                                                 \
      gemm_4bit_many##tokens##_##name(T* y, float* partial_sums, const T* x, Weight4bit weight, const T* bias, int64 M,     \
                                      int stages_each) {                                                                    \
    multiply_many<T, tokens, nested>(y, partial_sums, x, weight, bias, M, stages_each);                                     \
  }
#define MANY(name, T)                                                                                                       \
  MANY_TOKENS(name, T, 32, false)                                                                                           \
  MANY_TOKENS(name, T, 64, false)                                                                                           \
  MANY_TOKENS(name##_nested, T, 32, true)                                                                                   \
  MANY_TOKENS(name##_nested, T, 64, true)                                                                                   \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                    \
      gemm_4bit_add_##name(T* y, const float* partial_sums, const T* bias, int64 M, int64 N, int parts) {                   \
    add_partial_sums(y, partial_sums, bias, M, N, parts);                                                                   \
  }

MANY(float16, __half)
MANY(bfloat16, __nv_bfloat16)
#if __CUDA_ARCH__ < 1200  // from there on a block cannot have the shared memory
MANY_TOKENS(float16, __half, 128, false)
MANY_TOKENS(float16_nested, __half, 128, true)
MANY_TOKENS(bfloat16, __nv_bfloat16, 128, false)
MANY_TOKENS(bfloat16_nested, __nv_bfloat16, 128, true)
#endif
#endif
