// gemm_4bit for one row of x, on tensor cores (sm_80 and up), at the speed at which memory gives W.
//
// For weights that are large enough to be worth it; gemm_4bit_few.cu begins faster.
//
// Each block has its share of the groups of kRows rows of W, one after the other in memory, and each of its warps an equal run of their
// pieces of kRows rows and kColumns columns, which it copies ahead into kSlots slots of shared memory. Lane (g, t) = (lane / 4, lane % 4)
// multiplies 16 codes of chunk g, of 64 columns with one scale, by the same columns of x. In a product of tiles, rows g and g + 8 stand
// for chunk g of two rows of W, and column g for that of x: so the sums are on the diagonal, and what is beside it means nothing.
#include "copy_ahead.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "weight_4bit.cuh"

#if __CUDA_ARCH__ >= 800
constexpr int kWarps = 8;
constexpr int kSlots = 3;
constexpr int kRows = 8;
constexpr int kColumns = 512;
constexpr int kChunk = 64;
constexpr int kChunks = kColumns / kChunk;
constexpr int kRowBytes = kColumns / 2;

// A piece in shared memory: codes [kRows][kColumns / 2], then scales [kRows / 2][kChunks][2].
constexpr int kScalesAt = kRows * kRowBytes;
constexpr int kPieceBytes = kScalesAt + kRows * kChunks * 4;

// Fills the pieces of a warp, one after the other.
struct Reader {
  static constexpr int kCopies = kRows * kRowBytes / 512, kCopyRows = 512 / kRowBytes;  // of 16 bytes of codes a lane; rows of each
  static constexpr int kScalesEach = kRows * kChunks / 32, kScaleRows = 32 / kChunks;   // scales that a lane copies; rows of each

  const Weight4bit& weight;
  const int lane;
  const int64 row_bytes, turn;  // turn: from where a group's pieces end to the next group, in bytes
  const int K;
  const uint8* codes;           // the first 16 bytes of the next piece that this lane copies
  int64 element;                // the first of those that have the first scale that this lane copies
  int column, rows;             // of the next piece: its first column, and how many rows of W there are from its first on
  int codes_end, scales_end;    // columns from which on there is nothing for this lane to copy
  uint32 codes_at, scales_at;   // where this lane's copies go in a piece

  __device__ int code_row() const { return lane / (32 / kCopyRows); }
  __device__ int code_byte() const { return lane % (32 / kCopyRows) * 16; }
  __device__ int scale_row() const { return lane / kChunks; }
  __device__ int scale_chunk() const { return lane % kChunks; }

  __device__ Reader(const Weight4bit& weight, int lane, int64 row, int column)
      : weight(weight),
        lane(lane),
        row_bytes(weight.K / 2),
        turn(kRows * row_bytes - (weight.K + kColumns - 1) / kColumns * kRowBytes),
        K(int(weight.K)),
        codes(weight.packed + (row + code_row()) * row_bytes + column / 2 + code_byte()),
        element((weight.first_block << weight.blocksize_shift) + (row + scale_row()) * weight.K + column + scale_chunk() * kChunk),
        column(column),
        rows(int(min(weight.N - row, int64(1) << 30))),
        codes_end(K - 2 * code_byte()),
        scales_end(K - scale_chunk() * kChunk),
        codes_at(keep(code_row() * kRowBytes + code_byte())),
        scales_at(keep(kScalesAt + (scale_row() / 2 * kChunks + scale_chunk()) * 8 + scale_row() % 2 * 4)) {}

  // Bring the first `count` pieces, up to two of a group, near: each lane a line of 128 bytes.
  __device__ void bring_near(int count) const {
    const int line = lane % 2 * 128 + lane / 16 * kRowBytes, row = lane / 2 % kRows;
    if (lane / 16 < count && column + 2 * line < K && row < rows) prefetch(codes - code_byte() + (row - code_row()) * row_bytes + line);
  }

  // Ask for the next piece. What lies beyond the row, or the last row, is left as it is.
  __device__ void ask(uint32 piece) {
    const uint8* from = codes;
#pragma unroll
    for (int i = 0; i < kCopies; ++i, from += kCopyRows * row_bytes) {
      if (column < codes_end && code_row() + i * kCopyRows < rows) copy_ahead<16>(piece + codes_at + i * 512, from);
    }
#pragma unroll
    for (int i = 0; i < kScalesEach; ++i) {
      if (column < scales_end && scale_row() + i * kScaleRows < rows) {
        const int64 block = (element + i * kScaleRows * weight.K) >> weight.blocksize_shift;
        copy_ahead<4>(piece + scales_at + i * 128, static_cast<const float*>(weight.scales.absmax) + block);
      }
    }
    column += kColumns;
    codes += kRowBytes;
    element += kColumns;
    if (column >= K) {
      column = 0;
      rows -= kRows;
      codes += turn;
      element += 2 * turn;
    }
  }
};

// Sum up what lanes on the diagonal have for each of eight rows: the sum of row i to lanes i, i + 8, ...
__device__ inline float sum_of_rows(const float (&totals)[kRows], int lane, bool on_diagonal) {
  float sums[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) sums[i] = on_diagonal ? totals[i] : 0.0f;
#pragma unroll
  for (int bit = 1; bit < kRows; bit *= 2) {  // lanes keep half of the sums each, and give the others
#pragma unroll
    for (int i = 0; i < kRows / 2 / bit; ++i) {
      const float given = lane & bit ? sums[2 * i] : sums[2 * i + 1], kept = lane & bit ? sums[2 * i + 1] : sums[2 * i];
      sums[i] = kept + __shfl_xor_sync(~0u, given, bit);
    }
  }
#pragma unroll
  for (int offset = kRows; offset < 32; offset *= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
  return sums[0];
}

// Shared memory: the table, the pieces of each warp. Scales are plain ones.
template <class T>
__device__ void multiply_one(T* y, const T* x, const Weight4bit& weight, const T* bias) {
  __shared__ float shared_sums[kWarps][2][kRows];  // of a run's first group, and of its last, where other warps have part of them
  const int warp = keep(int(threadIdx.x) / 32), lane = keep(int(threadIdx.x) % 32), g = lane / 4, t = lane % 4;
  const uint32 pieces = keep(shared_address(shared + PairTable<T>::kWords) + warp * kSlots * kPieceBytes);
  const uint32 table = keep(PairTable<T>::address()), codes_at = keep(g * 32 + t * 8), scales_at = keep(kScalesAt + g * 8);
  const int K = int(weight.K), pieces_of_group = (K + kColumns - 1) / kColumns;
  const int64 N = weight.N, groups = (N + kRows - 1) / kRows;
  const int64 first_group = groups * blockIdx.x / gridDim.x;
  const int group_count = int(groups * (blockIdx.x + 1) / gridDim.x - first_group), piece_count = group_count * pieces_of_group;
  const auto run_begin = [&](int warp) { return int(int64(piece_count) * warp / kWarps); };
  const int begin = run_begin(warp), end = run_begin(warp + 1);
  const auto output = [&](int group, float sum) {  // lane i has the sum of row i
    const int64 row = (first_group + group) * kRows + lane;
    if (lane < kRows && row < N) y[row] = from_float<T>(bias ? sum + to_float(bias[row]) : sum);
  };

  let_next_begin();
  int group = begin / pieces_of_group, part = begin - group * pieces_of_group;
  Reader reader(weight, lane, (first_group + group) * kRows, part * kColumns);
  reader.bring_near(end - begin);
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) {
    if (begin + i < end) reader.ask(pieces + i * kPieceBytes);
    end_copies();
  }
  PairTable<T>::fill(weight.codebook);
  __syncthreads();

  bool whole = part == 0;  // from the group's first piece on
  float totals[kRows] = {};
  constexpr uint32 kAllSlots = kSlots * kPieceBytes;
  uint32 slot = 0, asked = (kSlots - 2) * kPieceBytes;  // of the piece to multiply, and of the one that was asked for last
  const int x_end = K - g * kChunk;                     // columns from which on there is none for this lane
  const T* run = x + part * kColumns + g * kChunk + t * 16;
  int k = part * kColumns;
  for (int number = begin; number < end; ++number) {
    const bool inside = k < x_end;
    const uint4 values[2] = {load_if(inside, run), load_if(inside, run + 8)};  // of x
    asked = asked + kPieceBytes < kAllSlots ? asked + kPieceBytes : 0;
    wait_for_copies<kSlots - 2>();
    __syncwarp();  // the warp's copies are here, and none still reads what the next ones overwrite
    if (number + kSlots - 1 < end) reader.ask(pieces + asked);
    end_copies();
    const uint32 piece = pieces + slot;
    slot = slot + kPieceBytes < kAllSlots ? slot + kPieceBytes : 0;
#pragma unroll
    for (int pair = 0; pair < kRows / 2; ++pair) {
      const uint2 low = load_shared<uint2>(piece + codes_at + 2 * pair * kRowBytes);
      const uint2 high = load_shared<uint2>(piece + codes_at + (2 * pair + 1) * kRowBytes);
      const uint2 scales = load_shared<uint2>(piece + scales_at + pair * kChunks * 8);
      float sums[4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32 a[4];
        PairTable<T>::fragment(a, table, j ? low.y : low.x, j ? high.y : high.x, 0);
        multiply_tile<T>(sums, a, values[j].x, values[j].y);
        PairTable<T>::fragment(a, table, j ? low.y : low.x, j ? high.y : high.x, 1);
        multiply_tile<T>(sums, a, values[j].z, values[j].w);
      }
      // Columns 2t and 2t + 1 of the sums: where t is g / 2, one of them is on the diagonal.
      if (inside) {
        totals[2 * pair] = fmaf(g % 2 ? sums[1] : sums[0], __uint_as_float(scales.x), totals[2 * pair]);
        totals[2 * pair + 1] = fmaf(g % 2 ? sums[3] : sums[2], __uint_as_float(scales.y), totals[2 * pair + 1]);
      }
    }
    k += kColumns;
    run += kColumns;
    if (k >= K || number + 1 == end) {
      const float sum = sum_of_rows(totals, lane, t == g / 2);
      if (whole && k >= K) {
        output(group, sum);
      } else if (lane < kRows) {
        shared_sums[warp][whole][lane] = sum;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) totals[i] = 0.0f;
      whole = true;
      run -= k;
      k = 0;
      ++group;
    }
  }
  __syncthreads();
  // Groups that several warps have part of are the first one's to put together.
  const int last_group = (end - 1) / pieces_of_group, group_end = (last_group + 1) * pieces_of_group;
  if (begin == end || group_end == end || last_group * pieces_of_group < begin) return;
  float sum = lane < kRows ? shared_sums[warp][1][lane] : 0.0f;
  for (int other = warp + 1; other < kWarps && run_begin(other) < group_end; ++other) {
    if (lane < kRows && run_begin(other) < run_begin(other + 1)) sum += shared_sums[other][0][lane];
  }
  output(last_group, sum);
}

// Shared memory and threads of each kernel: native/host/gemm_4bit.cpp has the same numbers.
#define ONE(name, T)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(32 * kWarps, 2)                                                          \
      gemm_4bit_one_##name(T* y, const T* x, Weight4bit weight, const T* bias) {                                        \
    multiply_one(y, x, weight, bias);                                                                                   \
  }

ONE(float16, __half)
ONE(bfloat16, __nv_bfloat16)
#endif
