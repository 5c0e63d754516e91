// The exact nearest code of a value, with one look-up and one addition for nearly every value.
//
// The code is that of the entry whose rank is the number of midpoints strictly below the value. Keys are integers in the order of the
// values; their leading bits name a bucket. In the buckets of any sensible codebook lies at most one midpoint. A bucket is a word,
// made so that the sum of the word and the key of a value has the value's rank in the highest byte: what is below carries into it if
// the key is larger than the midpoint's. Where more than one midpoint lies in a bucket, the word says so, and the midpoints are
// searched. Tables are made from the codebook by each block of threads: they depend on its contents alone.
#pragma once

#include "blocks.cuh"
#include "floats.cuh"

// The highest bytes of four words, the first in the lowest.
__device__ inline uint32 highest_bytes(uint32 first, uint32 second, uint32 third, uint32 fourth) {
  return __byte_perm(__byte_perm(first, second, 0x0073), __byte_perm(third, fourth, 0x0073), 0x5410);
}

// kBits: bits of the mantissa that name a bucket, one more where no midpoint is negative.
template <int kEntries, int kBits>
class NearestCode {
 public:
  // In shared memory.
  struct Table {
    uint32 words[2 * ((25 << kBits) + 1)];
    float midpoints[kEntries];  // by rank; the last is infinity
    uint8 codes[kEntries];      // by rank
  };

  NearestCode() = default;

  // All threads of the block call it, kEntries at least; it ends with a barrier.
  __device__ NearestCode(Table& table, const float* codebook) : table_(&table) {
    const int thread = threadIdx.x;
    const float value = thread < kEntries ? codebook[thread] : 0.0f;
    kind_ = __syncthreads_and(thread + 1 >= kEntries || value <= codebook[thread + 1]) ? kSorted : 0;
    if (thread < kEntries) {
      int rank = thread;
      if (!is(kSorted)) {
        rank = 0;
#pragma unroll 1
        for (int i = 0; i < kEntries; ++i) rank += codebook[i] < value || (codebook[i] == value && i < thread);
      }
      table.midpoints[rank] = value;
      table.codes[rank] = thread;
    }
    __syncthreads();
    float midpoint = __int_as_float(kInfinityBits);
    if (thread + 1 < kEntries) {
      // The sum with zero makes a negative zero positive: the order of the keys is then that of the values.
      midpoint = __fadd_rn(__fmul_rn(__fadd_rn(table.midpoints[thread], table.midpoints[thread + 1]), 0.5f), 0.0f);
    }
    if (__syncthreads_or(midpoint < 0.0f)) kind_ |= kSigned;
    if (thread < kEntries) table.midpoints[thread] = midpoint;
    const bool tiny = __syncthreads_or(fabsf(midpoint) < kSmall && midpoint != 0.0f);
    const bool crowded = thread + 1 < kEntries && bucket(midpoint) == bucket(table.midpoints[thread + 1]);
    if (__syncthreads_or(crowded || midpoint == 0.0f) || tiny) kind_ |= kCareful;
    is(kSigned) ? fill<true>(table, tiny) : fill<false>(table, tiny);
    __syncthreads();
  }

  // Codes of eight elements as they lie in memory.
  static constexpr int kPerByte = kEntries == 16 ? 2 : 1;
  static constexpr int kWords = 2 / kPerByte;

  // The codes of values whose block has an absmax of the bits `largest`.
  template <int kEights>
  __device__ void find(const float (&values)[kEights][8], uint32 largest, uint32 (&words)[kEights * kWords]) const {
    if (largest < kOrdinaryBits && !is(kCareful)) {
      const float scale = reciprocal(__uint_as_float(max(largest, kFloorBits))) * kDown;
#pragma unroll
      for (int i = 0; i < kEights; ++i) {
        uint32 codes[8];
        is(kSigned) ? look_up<true, false>(values[i], scale, codes) : look_up<false, false>(values[i], scale, codes);
        if (!is(kSorted)) from_ranks(codes);
        pack(codes, words + i * kWords);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEights; ++i) find_carefully(values[i], largest, words + i * kWords);
    }
  }

  // The code of one value, searched. `scale` is scale_from(largest).
  __device__ uint32 code(float value, uint32 largest, float scale) const {
    return table_->codes[below(largest < kInfinityBits ? __fmul_rn(value, scale) : 0.0f)];
  }

 private:
  // What kind of codebook it is, in bits.
  static constexpr int kSorted = 1;   // codes are ranks
  static constexpr int kSigned = 2;   // a midpoint is negative
  static constexpr int kCareful = 4;  // not every code can be looked up

  static constexpr float kSmall = 5.960464477539063e-08f;  // 2^-24: less than half of any entry of bitsandbytes' dynamic maps
  static constexpr float kDown = 1.9721522630525295e-31f;  // 2^-102: takes 2^-24 to the smallest number that is not subnormal
  static constexpr float kUp = 5.070602400912918e+30f;     // 2^102
  static constexpr int kSmallKey = 0x00800000;             // the key of 2^-24
  static constexpr uint32 kOrdinaryBits = 0x4b800000;      // 2^24: below it, the scale times kDown is not subnormal either
  static constexpr uint32 kSearch = 0xffffffff;            // in place of a word

  __device__ bool is(int kind) const { return kind_ & kind; }

  // The bits of a key below those that name its bucket.
  __device__ int shift() const { return is(kSigned) ? 23 - kBits : 22 - kBits; }

  // The key of a value that has been multiplied by kDown: a number of less than 2^24 subnormal values, and octaves from there.
  template <bool kIsSigned>
  __device__ static int key(float scaled) {
    const int bits = __float_as_int(scaled);
    return kIsSigned ? bits ^ (bits >> 31 & 0x7fffffff) : max(bits, 0);
  }

  __device__ int bucket(float value) const {
    return (is(kSigned) ? key<true>(__fmul_rn(value, kDown)) : key<false>(__fmul_rn(value, kDown))) >> shift();
  }

  // Make the words of all buckets. Each thread takes neighbours, so that it meets the midpoints in order.
  template <bool kIsSigned>
  __device__ void fill(Table& table, bool tiny) const {
    constexpr int kShift = kIsSigned ? 23 - kBits : 22 - kBits, kSide = (25 << kBits) + 1, kFirst = kIsSigned ? -kSide : 0;
    const int each = (2 * kSide + blockDim.x - 1) / blockDim.x;
    int at = kFirst + int(threadIdx.x) * each;
    const int last = min(at + each, kFirst + 2 * kSide), start = at * (1 << kShift);
    uint32 rank = below(__fmul_rn(__int_as_float(start < 0 ? start ^ 0x7fffffff : start), kUp));
    int next = key<kIsSigned>(__fmul_rn(table.midpoints[rank], kDown));
#pragma unroll 1
    for (; at < last; ++at) {
      const int low = at * (1 << kShift);
      uint32 word = (rank << 24) - low;
      if (next >> kShift == at) {
        word = (++rank << 24) - next - 1;
        while ((next = key<kIsSigned>(__fmul_rn(table.midpoints[rank], kDown))) >> kShift == at) word = kSearch, ++rank;
      }
      // Below 2^-24 keys are rounded, so midpoints are searched there, and next to it.
      table.words[at - kFirst] = tiny && abs(low) <= kSmallKey + (1 << kShift) ? kSearch : word;
    }
  }

  // Look the ranks up, which are in the highest byte. Return whether they must be searched instead, which only a careful look
  // finds out.
  template <bool kIsSigned, bool kIsCareful>
  __device__ bool look_up(const float (&values)[8], float scale, uint32 (&ranks)[8]) const {
    constexpr int kShift = kIsSigned ? 23 - kBits : 22 - kBits;
    const uint32* const words = table_->words + (kIsSigned ? (25 << kBits) + 1 : 0);
    bool exact = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scaled = __fmul_rn(values[i], scale);
      const int where = key<kIsSigned>(scaled);
      const uint32 word = words[where >> kShift];
      ranks[i] = word + where;
      // A value may be above a midpoint of zero although what it has been scaled to is not.
      if (kIsCareful) exact |= (word == kSearch) | (scaled == 0.0f) & (values[i] != 0.0f);
    }
    return exact;
  }

  __device__ void from_ranks(uint32 (&codes)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = table_->codes[codes[i] >> 24] << 24;
  }

  // From the highest bytes.
  __device__ static void pack(const uint32 (&codes)[8], uint32* words) {
    if (kPerByte == 2) {  // the first of two is in the high half
      words[0] = highest_bytes(codes[0], codes[2], codes[4], codes[6]) * 16 + highest_bytes(codes[1], codes[3], codes[5], codes[7]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) words[i] = highest_bytes(codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]);
    }
  }

  __device__ void find_carefully(const float (&values)[8], uint32 largest, uint32* words) const {
    uint32 codes[8];
    bool exact = largest >= kOrdinaryBits;
    if (!exact) {
      const float scale = reciprocal(__uint_as_float(max(largest, kFloorBits))) * kDown;
      exact = is(kSigned) ? look_up<true, true>(values, scale, codes) : look_up<false, true>(values, scale, codes);
    }
    if (exact) {
      const float scale = scale_from(largest);
#pragma unroll
      for (int i = 0; i < 8; ++i) codes[i] = code(values[i], largest, scale) << 24;
    } else {
      from_ranks(codes);
    }
    pack(codes, words);
  }

  // How many midpoints are strictly below a value: its rank.
  __device__ uint32 below(float value) const {
    int count = 0;
#pragma unroll 1
    for (int step = kEntries / 2; step > 0; step /= 2) {
      if (table_->midpoints[count + step - 1] < value) count += step;
    }
    return count;
  }

  const Table* table_;
  int kind_;
};

// NF4 and FP4 need no more than two bits.
using NearestCode4bit = NearestCode<16, 2>;
using NearestCode8bit = NearestCode<256, 6>;
