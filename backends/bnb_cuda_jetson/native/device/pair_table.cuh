// The table by which tensor-core kernels turn codes into values, at the start of dynamic shared memory.
#pragma once

#include "floats.cuh"

extern __shared__ uint32 shared[];

// Pairs of values for each byte of codes, rounded to T: 32 copies, one for each lane, so that no two lanes meet in a bank; or fewer,
// 4, 8 or 16, where room is short.
template <class T, int kCopies = 32>
struct PairTable {
  static constexpr int kWords = 256 * kCopies;

  __device__ static void fill(const float* codebook) {
    constexpr int kParts = kCopies < 8 ? 1 : 2, kPieces = kCopies / 4 / kParts;  // threads for a byte; pieces of 16 bytes of each
    for (int i = threadIdx.x; i < 256 * kParts; i += blockDim.x) {
      const int byte = i % 256;
      const uint32 pair = pack_two<T>(codebook[byte >> 4], codebook[byte & 15]);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {  // in another order for each lane, since all entries begin in the same bank
        reinterpret_cast<uint4*>(shared)[(byte * kParts + i / 256) * kPieces + (j + i / 2) % kPieces] = make_uint4(pair, pair, pair, pair);
      }
    }
  }

  __device__ static uint32 address() { return uint32(__cvta_generic_to_shared(shared + threadIdx.x % kCopies)); }

  // What a byte of `word` stands for. Written out: from an array subscript the compiler makes four instructions rather than two.
  __device__ static uint32 look_up(uint32 table, uint32 word, int byte) {
    uint32 pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(table + __byte_perm(word, 0, 0x4440 + byte) * (kCopies * 4)));
    return pair;
  }

  // The fragment of a tile product: bytes 2 * half and 2 * half + 1 of rows g and g + 8.
  __device__ static void fragment(uint32 (&a)[4], uint32 table, uint32 word0, uint32 word8, int half) {
    a[0] = look_up(table, word0, 2 * half);
    a[1] = look_up(table, word8, 2 * half);
    a[2] = look_up(table, word0, 2 * half + 1);
    a[3] = look_up(table, word8, 2 * half + 1);
  }
};
