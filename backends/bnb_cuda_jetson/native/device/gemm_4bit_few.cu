// gemm_4bit for few rows of x: y = x W^T + bias at the speed at which memory gives W.
//
// A warp takes pieces of W of 16 rows and 256 columns, which it copies ahead into slots of shared memory: kSlots for each warp. Lane
// (g, t) = (lane / 4, lane % 4) multiplies runs of 16 or 32 codes of rows g and g + 8. Several warps of a block may share the pieces of a
// tile of 16 rows; their sums meet in shared memory, always in the same order.
#include "copy_ahead.cuh"
#include "mma.cuh"
#include "overlap.cuh"
#include "pair_table.cuh"
#include "weight_4bit.cuh"

constexpr int kRows = 16;      // of a tile
constexpr int kColumns = 256;  // of a piece
constexpr int kSlots = 3;
constexpr int kRowBytes = kColumns / 2;

// A piece in shared memory. Rows are 128 bytes; in odd ones the halves are exchanged, so that lanes of two rows meet in no bank.
// kScaleRun: 64 or 32 codes, which have one scale.
template <int kScaleRun>
struct Piece {
  static constexpr int kScales = kColumns / kScaleRun;  // of a row
  uint8 codes[kRows][kRowBytes];
  float scales[kRows][kScales + 1];  // a row more than needed apart

  __device__ void* codes_at(int row, int byte) { return &codes[row][byte ^ (row % 2 * (kRowBytes / 2))]; }
  __device__ uint4 sixteen(int row, int byte) { return *static_cast<const uint4*>(codes_at(row, byte)); }
  __device__ uint2 eight(int row, int byte) { return *static_cast<const uint2*>(codes_at(row, byte)); }
};

#if __CUDA_ARCH__ >= 800
// One row of x, on tensor cores. A tile product has eight columns: one for each of the eight runs of 32 columns that a piece's rows have,
// and x stands in a run's own column only. So sums come out run by run, and are scaled in float32 once a piece.
template <class T_, int kScaleRun_>
struct OneRowDot {
  using T = T_;
  using Table = PairTable<T>;
  static constexpr int kTokens = 1;
  static constexpr int kScaleRun = kScaleRun_;

  uint32 table;
  const T* row;  // of x: the run of this lane's column
  int my_step;   // at which it is multiplied; -1 for lanes whose column is another lane's
  uint4 values[2][4];
  float totals[4];

  __device__ void take(const T* x, int64, int) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    table = Table::address();
    my_step = g % 4 == t ? g / 4 : -1;
    row = x + g * 32;
  }

  // Read x for the piece that begins at column k.
  __device__ void read(int k, int K) {
    const uint4* const run = reinterpret_cast<const uint4*>(row + k);
    const bool inside = k + int(threadIdx.x) % 32 / 4 * 32 < K;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[step][j] = load_if(inside && step == my_step, run + j);
    }
  }

  __device__ void clear() { totals[0] = totals[1] = totals[2] = totals[3] = 0.0f; }

  __device__ void add(Piece<kScaleRun>& piece, int k, int K) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float even[4] = {}, odd[4] = {};  // in turn: a product need not wait for the one before
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint4 codes0 = piece.sixteen(g, step * 64 + t * 16), codes8 = piece.sixteen(g + 8, step * 64 + t * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32 word0 = j < 2 ? (j ? codes0.y : codes0.x) : (j == 2 ? codes0.z : codes0.w);
        const uint32 word8 = j < 2 ? (j ? codes8.y : codes8.x) : (j == 2 ? codes8.z : codes8.w);
        uint32 a[4];
        Table::fragment(a, table, word0, word8, 0);
        multiply_tile<T>(even, a, values[step][j].x, values[step][j].y);
        Table::fragment(a, table, word0, word8, 1);
        multiply_tile<T>(odd, a, values[step][j].z, values[step][j].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int this_run = 2 * t + i % 2;
      const float scale = k + this_run * 32 < K ? piece.scales[g + i / 2 * 8][this_run * 32 / kScaleRun] : 0.0f;
      totals[i] = fmaf(even[i] + odd[i], scale, totals[i]);
    }
  }

  // Write the tile's sums, [kTokens][kRows].
  __device__ void store(float* to) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float low = totals[0] + totals[1], high = totals[2] + totals[3];
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      low += __shfl_xor_sync(~0u, low, offset);
      high += __shfl_xor_sync(~0u, high, offset);
    }
    if (t == 0) to[g] = low, to[g + 8] = high;
  }
};

// Several rows of x on tensor cores, in steps of 64 or 128 columns. A tile product adds up the runs of the four lanes t, of 16 or 32
// columns, which may have different scales: then each row of x takes kGroups columns, with zeros in place of the other groups' runs,
// and each group's sum is a column of its own.
//   kRun 16, kGroups 1: one scale for 64 columns;  kRun 32, kGroups 2: two for 128;  kRun 32, kGroups 4: four
template <class T_, int kRun, int kGroups, int kTiles>
struct RowsDot {
  using T = T_;
  using Table = PairTable<T>;
  static constexpr int kTokens = 8 * kTiles / kGroups;
  static constexpr int kScaleRun = 4 * kRun / kGroups;

  uint32 table;
  const T* rows[kTiles];  // of x: this lane's runs of the first step
  bool has_column[kTiles];
  float totals[kTiles][4];

  __device__ void take(const T* x, int64 stride, int tokens) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    table = Table::address();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int token = (8 * i + g) / kGroups;
      has_column[i] = token < tokens && t / (4 / kGroups) == g % kGroups;
      rows[i] = x + token * stride + t * kRun;
    }
  }

  __device__ void read(int, int) {}  // each step reads its own

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) totals[i][0] = totals[i][1] = totals[i][2] = totals[i][3] = 0.0f;
  }

  __device__ void add(Piece<kScaleRun>& piece, int k, int K) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < kColumns / (4 * kRun); ++step) {
      const int at = k + step * 4 * kRun;
      if (at >= K) break;
      const bool inside = at + t * kRun < K;
      uint4 values[kTiles][kRun / 8];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint4* const run = reinterpret_cast<const uint4*>(rows[i] + at);
#pragma unroll
        for (int j = 0; j < kRun / 8; ++j) values[i][j] = has_column[i] && inside ? __ldg(run + j) : make_uint4(0, 0, 0, 0);
      }
      float sums[kTiles][4] = {};
#pragma unroll
      for (int eight = 0; eight < kRun / 16; ++eight) {
        const int byte = step * 2 * kRun + t * kRun / 2 + eight * 8;
        const uint2 codes0 = piece.eight(g, byte), codes8 = piece.eight(g + 8, byte);
#pragma unroll
        for (int half = 0; half < 4; ++half) {
          uint32 a[4];
          Table::fragment(a, table, half < 2 ? codes0.x : codes0.y, half < 2 ? codes8.x : codes8.y, half % 2);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const uint4 b = values[i][2 * eight + half / 2];
            multiply_tile<T>(sums[i], a, half % 2 ? b.z : b.x, half % 2 ? b.w : b.y);
          }
        }
      }
      // Columns 2t and 2t + 1 of the tile product are of these groups.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int group = (2 * t + j % 2) % kGroups;
        const float scale = at + group * kScaleRun < K ? piece.scales[g + j / 2 * 8][step * kGroups + group] : 0.0f;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) totals[i][j] = fmaf(sums[i][j], scale, totals[i][j]);
      }
    }
  }

  __device__ void store(float* to) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (kGroups == 1) {
#pragma unroll
        for (int j = 0; j < 4; ++j) to[(8 * i + 2 * t + j % 2) * kRows + g + j / 2 * 8] = totals[i][j];
      } else {
        float low = totals[i][0] + totals[i][1], high = totals[i][2] + totals[i][3];
        if (kGroups == 4) {
          low += __shfl_xor_sync(~0u, low, 1);
          high += __shfl_xor_sync(~0u, high, 1);
        }
        const int token = (8 * i + 2 * t) / kGroups;
        to[token * kRows + g] = low;
        to[token * kRows + g + 8] = high;
      }
    }
  }
};
#endif

// Values for each code, for each lane.
struct ValueTable {
  static constexpr int kWords = 16 * 32;

  __device__ static void fill(const float* codebook) {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) shared[i] = __float_as_uint(codebook[i / 32]);
  }
};

// Products and sums in float32 throughout: for float32, and where tensor cores lack the layout or the dtype.
template <class T_, int kTokens_>
struct ScalarDot {
  using T = T_;
  using Table = ValueTable;
  static constexpr int kTokens = kTokens_;
  static constexpr int kScaleRun = 32;

  const uint32* table;
  const T* rows;  // of x: this lane's runs of the first step
  int64 stride;
  int tokens;
  float totals[2][kTokens];

  __device__ void take(const T* x, int64 x_stride, int x_tokens) {
    table = shared + threadIdx.x % 32;
    rows = x + threadIdx.x % 4 * 32;
    stride = x_stride;
    tokens = x_tokens;
  }

  __device__ void read(int, int) {}  // each step reads its own

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) totals[0][i] = totals[1][i] = 0.0f;
  }

  __device__ float look_up(uint32 word, int element) const {
    const int bit = element / 2 * 8 + (element % 2 ? 0 : 4);
    return __uint_as_float(table[(word >> bit & 15) * 32]);
  }

  __device__ void add(Piece<kScaleRun>& piece, int k, int K) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int at = k + step * 128;
      if (at + t * 32 >= K) break;
      float sums[2][kTokens] = {};
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const uint2 codes[2] = {piece.eight(g, step * 64 + t * 16 + eight * 8), piece.eight(g + 8, step * 64 + t * 16 + eight * 8)};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float weights[2][8];
#pragma unroll
          for (int i = 0; i < 16; ++i) weights[i / 8][i % 8] = look_up(j ? codes[i / 8].y : codes[i / 8].x, i % 8);
#pragma unroll
          for (int token = 0; token < kTokens; ++token) {
            if (token < tokens) {
              float values[8];
              load_eight(rows + token * stride + at + 16 * eight + 8 * j, values);
#pragma unroll
              for (int i = 0; i < 16; ++i) sums[i / 8][token] = fmaf(weights[i / 8][i % 8], values[i % 8], sums[i / 8][token]);
            }
          }
        }
      }
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        totals[0][token] = fmaf(sums[0][token], piece.scales[g][step * 4 + t], totals[0][token]);
        totals[1][token] = fmaf(sums[1][token], piece.scales[g + 8][step * 4 + t], totals[1][token]);
      }
    }
  }

  __device__ void store(float* to) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = totals[half][token];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (t == 0) to[token * kRows + g + half * 8] = total;
      }
    }
  }
};

// Fills the pieces of a warp. Nested scales come in groups of a power of two.
template <int kScaleRun, bool kNested>
struct Reader {
  using Piece = Piece<kScaleRun>;
  static constexpr int kMine = kRows * Piece::kScales / 32;  // scales that a lane reads
  static constexpr int kScaleRows = 32 / Piece::kScales;     // rows whose scales a warp reads at a time

  const Weight4bit& weight;
  const float* const nested_entries;
  const uint8* codes;   // the 16 bytes of the tile's first rows that this lane copies; it does those of every fourth row
  const int64 row_bytes;
  int64 elements[kMine];  // the first of each row that this lane reads a scale of
  int rows;               // of W from the tile on
  float group_scales[kMine];  // of nested scales asked for
  uint8 scale_codes[kMine];
  float nested_offset;

  __device__ Reader(const Weight4bit& weight, const float* nested_entries)
      : weight(weight), nested_entries(nested_entries), row_bytes(weight.K / 2) {}

  __device__ static int scale_row(int i) { return i * kScaleRows + threadIdx.x % 32 / Piece::kScales; }
  __device__ static int scale_number() { return threadIdx.x % Piece::kScales; }

  // Turn to a tile.
  __device__ void aim(int64 tile) {
    const int lane = threadIdx.x % 32;
    codes = weight.packed + (tile * kRows + lane / 8) * row_bytes + lane % 8 * 16;
    rows = int(min(weight.N - tile * kRows, int64(kRows)));
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      elements[i] = (tile * kRows + scale_row(i)) * weight.K + scale_number() * kScaleRun +
                    (weight.first_block << weight.blocksize_shift);
    }
  }

  // Turn to a later tile: `tiles` further on.
  __device__ void advance(int64 tiles, int64 tile) {
    codes += tiles * kRows * row_bytes;
    rows = int(min(weight.N - tile * kRows, int64(kRows)));
#pragma unroll
    for (int i = 0; i < kMine; ++i) elements[i] += tiles * kRows * weight.K;
  }

  // Ask for the piece that begins at column k. What lies beyond the row, or the last row, is left as it is.
  __device__ void ask(Piece& piece, int k, int K) {
    const int lane = threadIdx.x % 32;
    const uint8* from = codes + k / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i, from += 4 * row_bytes) {
      if (k + lane % 8 * 32 < K && i * 4 + lane / 8 < rows) copy_ahead<16>(piece.codes_at(i * 4 + lane / 8, lane % 8 * 16), from);
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (k + scale_number() * kScaleRun < K && scale_row(i) < rows) {
        const int64 block = (elements[i] + k) >> weight.blocksize_shift;
        if (kNested) {
          scale_codes[i] = __ldg(static_cast<const uint8*>(weight.scales.absmax) + block);
          group_scales[i] = __ldg(weight.scales.nested_absmax + (block >> weight.scales.nested_shift));
        } else {
          copy_ahead<4>(&piece.scales[scale_row(i)][scale_number()], static_cast<const float*>(weight.scales.absmax) + block);
        }
      }
    }
  }

  // Put the nested scales that were asked for last where they belong.
  __device__ void settle(Piece& piece) const {
    for (int i = 0; kNested && i < kMine; ++i) {
      const float scale = __fadd_rn(__fmul_rn(nested_entries[scale_codes[i]], group_scales[i]), nested_offset);
      piece.scales[scale_row(i)][scale_number()] = scale;
    }
  }
};

// Shared memory: the dot's table, the sums of two tiles of each warp, the entries of nested scales, the pieces.
template <class Dot, int kWarps, bool kNested>
__device__ void multiply_few(typename Dot::T* y, const typename Dot::T* x, const Weight4bit& weight, const typename Dot::T* bias, int64 M,
                             int split_shift) {
  using T = typename Dot::T;
  using Piece = Piece<Dot::kScaleRun>;
  constexpr int kSums = kRows * Dot::kTokens;
  float* const sums = reinterpret_cast<float*>(shared + Dot::Table::kWords);
  float* const nested_entries = sums + 2 * kWarps * kSums;
  Piece* const pieces = reinterpret_cast<Piece*>(nested_entries + (kNested ? 256 : 0)) + threadIdx.x / 32 * kSlots;
  const int warp = threadIdx.x / 32;
  const int split = 1 << split_shift, part = warp & (split - 1), team = warp >> split_shift;
  const int K = int(weight.K);
  const int64 N = weight.N, tiles = (N + kRows - 1) / kRows;
  const int64 first = blockIdx.x + int64(team) * gridDim.x, stride = int64(gridDim.x) * (kWarps >> split_shift);

  Reader<Dot::kScaleRun, kNested> reader(weight, nested_entries);
  let_next_begin();
  wait_for_previous();
  bool filled = false, odd = false;
  for (; M > 0; M -= Dot::kTokens, x += Dot::kTokens * weight.K, y += Dot::kTokens * N) {
    const int tokens = int(min(M, int64(Dot::kTokens)));
    int64 tile_ahead = first;
    int k_ahead = part * kColumns;
    auto ask = [&](int slot) {
      if (tile_ahead < tiles) {
        reader.ask(pieces[slot], k_ahead, K);
        k_ahead += split * kColumns;
        if (k_ahead >= K) {
          k_ahead = part * kColumns;
          tile_ahead += stride;
          reader.advance(stride, tile_ahead);
        }
      }
      end_copies();
    };
    if (first < tiles) reader.aim(first);
    ask(0);
    if (!filled) {  // while the first weights are on their way
      Dot::Table::fill(weight.codebook);
      if (kNested) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) nested_entries[i] = weight.scales.nested_codebook[i];
        reader.nested_offset = *weight.scales.nested_offset;
      }
      __syncthreads();
      filled = true;
    }
    reader.settle(pieces[0]);
    ask(1);
    Dot dot;
    dot.take(x, K, tokens);
    dot.clear();
    int slot = 0;
    for (int64 tile = first; tile < tiles; tile += stride) {
      for (int k = part * kColumns; k < K; k += split * kColumns) {
        const int next_slot = slot + 1 < kSlots ? slot + 1 : 0, last_slot = next_slot + 1 < kSlots ? next_slot + 1 : 0;
        dot.read(k, K);
        reader.settle(pieces[next_slot]);
        wait_for_copies<1>();
        __syncwarp();  // the warp's copies are here, and none still reads what the next ones overwrite
        ask(last_slot);
        dot.add(pieces[slot], k, K);
        slot = next_slot;
      }
      // While some warps still add up this tile's sums, others may write those of the next.
      float* const team_sums = sums + ((odd ? kWarps : 0) + team * split) * kSums;
      dot.store(team_sums + part * kSums);
      dot.clear();
      odd = !odd;
      asm volatile("bar.sync %0, %1;" ::"r"(team), "r"(split * 32) : "memory");
      for (int j = part * 32 + threadIdx.x % 32; j < kRows * tokens; j += split * 32) {
        const int64 row = tile * kRows + j % kRows;
        if (row >= N) continue;
        float sum = team_sums[j];
        for (int other = 1; other < split; ++other) sum += team_sums[other * kSums + j];
        if (bias) sum += to_float(bias[row]);
        y[j / kRows * N + row] = from_float<T>(sum);
      }
    }
    __syncwarp();
  }
}

// Shared memory and blocks of threads of each kernel: native/host/gemm_4bit.cpp has the same numbers.
#define FEW(name, T, warps, blocks, nested, ...)                                                               \
  extern "C" __global__ void __launch_bounds__(32 * (warps), blocks)                                           \
      gemm_4bit_few_##name(T* y, const T* x, Weight4bit weight, const T* bias, int64 M, int split_shift) {     \
    multiply_few<__VA_ARGS__, warps, nested>(y, x, weight, bias, M, split_shift);                              \
  }
#define PLAIN_AND_NESTED(name, T, plain_warps, nested_warps, blocks, ...) \
  FEW(name, T, plain_warps, blocks, false, __VA_ARGS__) FEW(name##_nested, T, nested_warps, blocks, true, __VA_ARGS__)
#define SCALAR(name, T)                                         \
  PLAIN_AND_NESTED(scalar1_##name, T, 8, 8, 2, ScalarDot<T, 1>) \
  PLAIN_AND_NESTED(scalar2_##name, T, 8, 8, 1, ScalarDot<T, 2>)

SCALAR(float32, float)
#if __CUDA_ARCH__ >= 800
#define TENSOR(name, T)                                                \
  PLAIN_AND_NESTED(one_##name, T, 16, 12, 1, OneRowDot<T, 64>)         \
  PLAIN_AND_NESTED(rows4_##name, T, 16, 16, 1, RowsDot<T, 32, 2, 1>)   \
  PLAIN_AND_NESTED(rows8_##name, T, 16, 16, 1, RowsDot<T, 16, 1, 1>)   \
  PLAIN_AND_NESTED(rows16_##name, T, 12, 12, 1, RowsDot<T, 16, 1, 2>)  \
  PLAIN_AND_NESTED(rows32_##name, T, 8, 8, 1, RowsDot<T, 16, 1, 4>)    \
  PLAIN_AND_NESTED(blocks32_##name, T, 12, 12, 1, RowsDot<T, 32, 4, 1>)
TENSOR(float16, __half)
TENSOR(bfloat16, __nv_bfloat16)
#else
SCALAR(float16, __half)
SCALAR(bfloat16, __nv_bfloat16)
#endif
#if __CUDA_ARCH__ >= 900  // where a block may have more shared memory
PLAIN_AND_NESTED(wide_rows16_float16, __half, 16, 12, 1, RowsDot<__half, 16, 1, 2>)
PLAIN_AND_NESTED(wide_rows16_bfloat16, __nv_bfloat16, 16, 12, 1, RowsDot<__nv_bfloat16, 16, 1, 2>)
#endif
