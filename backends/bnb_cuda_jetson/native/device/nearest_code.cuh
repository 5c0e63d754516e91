// The exact nearest code of a value, with one look-up for nearly every value.
//
// The code is that of the entry whose rank is the number of midpoints strictly below the value. The leading bits of the value name a
// bucket. In the buckets of any sensible codebook lies at most one midpoint, and a value there is on the midpoint's far side from zero
// if its remaining bits are larger. So a bucket is a word: the midpoint's remaining bits, above those that say what the code is on
// either side. Where more than one midpoint lies in a bucket, the word says so, and the midpoints are searched. Tables are made from
// the codebook by each block of threads: they depend on its contents alone.
//
// Values are at most 1 in magnitude, but for rounding.
#pragma once

#include "floats.cuh"

// A codebook in order: rank is by value, then by code.
template <int kEntries>
struct Ranking {
  float values[kEntries];     // by code
  float midpoints[kEntries];  // by rank; one fewer is used
  uint8 codes[kEntries];      // by rank
  bool sorted;                // codes are ranks
  bool has_negative;          // a midpoint is negative

  // All threads of the block call it, kEntries at least; it ends with a barrier.
  __device__ void build(const float* codebook) {
    const int thread = threadIdx.x;
    const float value = thread < kEntries ? codebook[thread] : 0.0f;
    const bool all_in_order = __syncthreads_and(thread + 1 >= kEntries || value <= codebook[thread + 1]);
    if (thread < kEntries) {
      int rank = thread;
      if (!all_in_order) {
        rank = 0;
#pragma unroll 1
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
      has_negative = some_negative;
    }
    __syncthreads();
  }

  // How many midpoints are strictly below a value: its rank.
  __device__ int below(float value) const {
    int count = 0;
#pragma unroll 1
    for (int step = kEntries / 2; step > 0; step /= 2) {
      if (midpoints[count + step - 1] < value) count += step;
    }
    return count;
  }

  // The same, from the rank of a neighbouring value.
  __device__ int below(float value, int rank) const {
    while (rank < kEntries - 1 && midpoints[rank] < value) ++rank;
    while (rank > 0 && !(midpoints[rank - 1] < value)) --rank;
    return rank;
  }

  // Ranks at the two ends of a bucket, whose magnitudes have the bits `low` to `last`. The midpoints in between are inside it.
  // `near` is a rank not far from them.
  __device__ int2 ends(bool negative, uint32 low, uint32 last, int near) const {
    const int from = below(negative ? -__uint_as_float(last) : __uint_as_float(low), near);
    return make_int2(from, below(negative ? -__uint_as_float(low) : __uint_as_float(last + 1), from));
  }
};

// For 16 entries: sign, exponent and three bits of the mantissa name a bucket. That is finer than the gaps of NF4 and FP4.
class NearestCode4bit {
 public:
  __device__ void build(const float* codebook) {
    ranking_.build(codebook);
    const uint32 small = bucket(false, 0, kSmall - 1), small_negative = bucket(true, 0, kSmall - 1);
    for (int at = threadIdx.x; at < kBuckets; at += blockDim.x) {
      const uint32 low = uint32(at) << kShift & 0x7fffffffu;
      const bool negative = at >= kBuckets / 2;
      const bool ordinary = low >= kSmall && low < kTwo;
      words_[at] = ordinary ? bucket(negative, low, low | ((1u << kShift) - 1)) : negative ? small_negative : small;
    }
    __syncthreads();
  }

  static constexpr bool kTakesNan = true;

  // The codes of some values; that of 0 for NaN.
  template <int kCount>
  __device__ void find(const float (&values)[kCount], uint32 (&codes)[kCount]) const {
    uint32 search = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32 bits = __float_as_uint(values[i]), word = words_[bits >> kShift];
      codes[i] = word >> (bits << (32 - kShift) > word ? 4 : 0) & 15;
      search |= word;
    }
    if (search & kSearch) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) codes[i] = ranking_.codes[ranking_.below(isnan(values[i]) ? 0.0f : values[i])];
    }
  }

 private:
  static constexpr int kShift = 20, kBuckets = 1 << (32 - kShift);
  static constexpr uint32 kSmall = 0x37800000;  // 2^-16: smaller values are one bucket
  static constexpr uint32 kTwo = 0x40000000;    // values never reach it, but for NaN, which falls to the small ones
  static constexpr uint32 kSearch = 1u << 8;    // below it: the code nearer to zero, and above that the other

  // The words for small magnitudes must be right for any remaining bits.
  __device__ uint32 bucket(bool negative, uint32 low, uint32 last) const {
    const int2 ranks = ranking_.ends(negative, low, last, 8);
    const uint32 from = ranking_.codes[ranks.x], to = ranking_.codes[ranks.y];
    const uint32 never = 0xffffffffu << (32 - kShift);  // no value's remaining bits are larger
    if (ranks.x == ranks.y) return never | from;
    if (ranks.y - ranks.x > 1 || low == 0) return kSearch;
    const uint32 midpoint = __float_as_uint(ranking_.midpoints[ranks.x]) << (32 - kShift);
    // A negative value that equals the midpoint is on its far side.
    return negative ? (midpoint - (1u << (32 - kShift))) | from << 4 | to : midpoint | to << 4 | from;
  }

  uint32 words_[kBuckets];
  Ranking<16> ranking_;
};

// For 256 entries: the same with more bits of the mantissa, but only for magnitudes from 2^-24, which is less than half the smallest
// entry of bitsandbytes' dynamic maps. Codebooks without negative midpoints get one bit more and no buckets for negative values.
class NearestCode8bit {
 public:
  __device__ void build(const float* codebook) {
    ranking_.build(codebook);
    const Layout layout(ranking_.has_negative);
    const int sides = ranking_.has_negative ? 2 : 1;
    // Each thread takes neighbouring buckets, whose ranks are near to each other.
    const int buckets = sides * layout.count, each = (buckets + blockDim.x - 1) / blockDim.x, first = threadIdx.x * each;
    int near = 128;
#pragma unroll 1
    for (int i = first; i < min(first + each, buckets); ++i) {
      const bool negative = i >= layout.count;
      if (i == first) near = ranking_.below((negative ? -1.0f : 1.0f) * __uint_as_float(layout.low(i % layout.count)));
      words_[i] = bucket(layout, i % layout.count, negative, near);
    }
    __syncthreads();
  }

  // The value of a code.
  __device__ float value(uint32 code) const { return ranking_.values[code]; }

  static constexpr bool kTakesNan = false;

  // The codes of some values.
  template <int kCount>
  __device__ void find(const float (&values)[kCount], uint32 (&codes)[kCount]) const {
    const Layout layout(ranking_.has_negative);
    uint32 search = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32 bits = __float_as_uint(values[i]);
      const int sign = int(bits) >> 31;
      const int at = max((int(bits & layout.magnitude) >> layout.shift) - layout.first, 0) - sign * layout.negative_side;
      const uint32 word = words_[at];
      // Further down on the negative side is a larger magnitude, so its bits are taken inverted.
      codes[i] = (word & 255) + ((bits ^ sign) << (32 - layout.shift) > word);
      search |= word;
    }
    if (search & kSearch) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) codes[i] = ranking_.below(values[i]);
    }
    if (!ranking_.sorted) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) codes[i] = ranking_.codes[codes[i]];
    }
  }

 private:
  static constexpr int kOctaves = 24, kBits = 7;
  static constexpr uint32 kSearch = 1u << 8;  // below it: the rank at the bucket's lower end

  // Where the buckets lie.
  struct Layout {
    int shift, first, count, negative_side;
    uint32 magnitude;

    __device__ explicit Layout(bool is_signed) {
      const int bits = is_signed ? kBits - 1 : kBits;
      shift = 23 - bits;
      // A bucket for all smaller magnitudes, those of the octaves, and one for 1.
      count = (kOctaves << bits) + 2;
      first = (127 << bits) - count + 1;
      negative_side = is_signed ? count : 0;
      magnitude = is_signed ? 0x7fffffffu : 0xffffffffu;  // with its sign, a negative value falls below the first bucket
    }

    // The smallest magnitude of a bucket, as bits.
    __device__ uint32 low(int at) const { return at ? uint32(first + at) << shift : 0; }
  };

  // `near` is a rank not far from the bucket's, and becomes one of them.
  __device__ uint32 bucket(const Layout& layout, int at, bool negative, int& near) const {
    const uint32 low = layout.low(at);
    const int2 ranks = ranking_.ends(negative, low, layout.low(at + 1) - 1, near);
    near = ranks.x;
    const uint32 never = 0xffffffffu << (32 - layout.shift);  // no value's remaining bits are larger
    if (ranks.x == ranks.y) return never | ranks.x;
    if (ranks.y - ranks.x > 1 || low == 0) return kSearch;
    const uint32 midpoint = __float_as_uint(ranking_.midpoints[ranks.x]);
    return (negative ? ~midpoint : midpoint) << (32 - layout.shift) | ranks.x;
  }

  uint32 words_[(kOctaves << kBits) + 4];
  Ranking<256> ranking_;
};
