// The exact nearest code of a value, with one look-up for nearly every value.
//
// The code is that of the entry whose rank is the number of midpoints strictly below the value. The leading bits of the value's
// magnitude name a bucket. In the buckets of any sensible codebook lies at most one midpoint, and a value there is above it if its
// remaining bits are larger. So a bucket is a word: the rank at its lower end, and the midpoint's remaining bits. Where more than one
// midpoint lies in a bucket, the word says so, and the midpoints are searched. Tables are made from the codebook by each block of
// threads: they depend on its contents alone.
#pragma once

#include "floats.cuh"

// kOctaves: powers of two below 1 that have buckets of their own. kBits: bits of the mantissa that name a bucket where no midpoint is
// negative; one bit fewer where some are, since the negative ones have buckets too then.
template <int kEntries, int kOctaves, int kBits>
struct NearestCode {
  static constexpr int kSharedBuckets = (kOctaves << kBits) + 4;
  static constexpr uint32 kSearch = 1u << 23;  // below it: the remaining bits; above it: the rank

  uint32 buckets[kSharedBuckets];
  float midpoints[kEntries];  // one fewer is used
  float values[kEntries];     // the codebook: by code
  uint8 codes[kEntries];      // by rank
  bool sorted;                // codes are ranks
  bool is_signed;             // a midpoint is negative

  // Fill the table, which is in shared memory. All threads of the block call it, kEntries at least; it ends with a barrier.
  __device__ void build(const float* codebook) {
    const int thread = threadIdx.x;
    const float value = thread < kEntries ? codebook[thread] : 0.0f;
    bool in_order = true;
    if (thread + 1 < kEntries) in_order = value <= codebook[thread + 1];
    const bool all_in_order = __syncthreads_and(in_order);
    if (thread < kEntries) {
      int rank = thread;
      if (!all_in_order) {
        rank = 0;
        for (int i = 0; i < kEntries; ++i) rank += codebook[i] < value || (codebook[i] == value && i < thread);
      }
      values[thread] = value;
      codes[rank] = thread;
    }
    __syncthreads();
    bool negative = false;
    if (thread + 1 < kEntries) {
      // The sum with zero makes a negative zero positive: the order of the bits is then that of the values.
      const float midpoint = __fadd_rn(__fmul_rn(__fadd_rn(values[codes[thread]], values[codes[thread + 1]]), 0.5f), 0.0f);
      midpoints[thread] = midpoint;
      negative = midpoint < 0.0f;
    }
    const bool some_negative = __syncthreads_or(negative);
    if (thread == 0) {
      sorted = all_in_order;
      is_signed = some_negative;
    }
    const Layout layout(some_negative);
    const int sides = some_negative ? 2 : 1;
    for (int i = thread; i < sides * layout.count; i += blockDim.x) {
      buckets[i] = bucket(layout, i % layout.count, i >= layout.count);
    }
    __syncthreads();
  }

  // Where the buckets lie: worked out once by each thread, and kept in registers.
  struct Layout {
    int shift, first, count, negative_side;
    uint32 magnitude, remaining;

    __device__ explicit Layout(bool is_signed) {
      const int bits = is_signed ? kBits - 1 : kBits;
      shift = 23 - bits;
      // A bucket for all smaller magnitudes, those of the octaves, and one for 1 and larger ones.
      count = (kOctaves << bits) + 2;
      first = (127 << bits) - count + 1;
      negative_side = is_signed ? count : 0;
      magnitude = is_signed ? 0x7fffffffu : 0xffffffffu;  // with its sign, a negative value falls below the first bucket
      remaining = (1u << shift) - 1;
    }
  };

  __device__ Layout layout() const { return Layout(is_signed); }

  // The rank of a value, which must not be NaN.
  __device__ int rank(const Layout& layout, float value) const {
    const uint32 bits = __float_as_uint(value);
    int at = (int(bits & layout.magnitude) >> layout.shift) - layout.first;
    at = min(max(at, 0), layout.count - 1) + int(bits >> 31) * layout.negative_side;
    const uint32 word = buckets[at];
    if (word & kSearch) return below(value);
    // Further down on the negative side is a larger magnitude, so its bits are taken inverted.
    const uint32 rest = (bits ^ uint32(int(bits) >> 31)) & layout.remaining;
    return int(word >> 24) + (rest > (word & (kSearch - 1)));
  }

  __device__ uint8 code(const Layout& layout, float value) const {
    const int found = rank(layout, value);
    return sorted ? found : codes[found];
  }

 private:
  // How many midpoints are strictly below a value.
  __device__ int below(float value) const {
    int count = 0;
#pragma unroll
    for (int step = kEntries / 2; step > 0; step /= 2) {
      if (midpoints[count + step - 1] < value) count += step;
    }
    return count;
  }

  __device__ uint32 bucket(const Layout& layout, int at, bool negative) const {
    const bool smallest = at == 0, largest = at == layout.count - 1;
    const uint32 low = smallest ? 0 : uint32(layout.first + at) << layout.shift;
    const uint32 last = largest ? 0x7f800000u : (uint32(layout.first + at + 1) << layout.shift) - 1;
    int from, to;  // ranks at the two ends
    if (negative) {
      from = below(-__uint_as_float(last));
      to = below(-__uint_as_float(low));
    } else {
      from = below(__uint_as_float(low));
      to = largest ? kEntries - 1 : below(__uint_as_float(last + 1));
    }
    uint32 rest = layout.remaining;  // no value's are larger
    if (to - from == 1 && !smallest && !largest) {
      rest = __float_as_uint(midpoints[from]);
      rest = (negative ? ~rest : rest) & layout.remaining;
    } else if (to > from) {
      return kSearch;
    }
    return uint32(from) << 24 | rest;
  }
};

// Buckets finer than the gaps of bitsandbytes' dynamic maps, down to a fifth of their smallest entry, ...
using NearestCode8bit = NearestCode<256, 24, 7>;
// ... and than those of NF4 and FP4.
using NearestCode4bit = NearestCode<16, 12, 4>;
