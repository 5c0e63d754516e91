// The table by which tensor-core kernels turn codes into values, at the start of dynamic shared memory.
#pragma once

#include "floats.cuh"

extern __shared__ uint32 shared[];

// Pairs of values for each byte of codes, rounded to T: 32 copies, one for each lane, so that no two lanes meet in a bank.
template <class T>
struct PairTable {
  static constexpr int kWords = 256 * 32;

  __device__ static void fill(const float* codebook) {
    for (int i = threadIdx.x; i < 256 * 2; i += blockDim.x) {
      const int byte = i % 256;
      const uint32 pair = pack_two<T>(codebook[byte >> 4], codebook[byte & 15]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 16 bytes each; in another order for each lane, since all entries begin in the same bank
        reinterpret_cast<uint4*>(shared)[byte * 8 + i / 256 * 4 + (j + i / 2) % 4] = make_uint4(pair, pair, pair, pair);
      }
    }
  }

  __device__ static uint32 address() { return uint32(__cvta_generic_to_shared(shared + threadIdx.x % 32)); }

  // What a byte of `word` stands for. Written out: from an array subscript the compiler makes four instructions rather than two.
  __device__ static uint32 look_up(uint32 table, uint32 word, int byte) {
    uint32 pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(table + __byte_perm(word, 0, 0x4440 + byte) * 128));
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
