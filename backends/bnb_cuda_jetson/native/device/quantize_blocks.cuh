// Quantization of blocks whose size is a power of two, 32 to 4096. A thread holds sixteen elements in registers from the load to the
// store, so that each is read once; the threads of a block find its absmax together.
#pragma once

#include "blocks.cuh"
#include "floats.cuh"
#include "nearest_code.cuh"

constexpr int kQuantizeThreads = 256;
constexpr int kPerThread = 16;
constexpr int kQuantizeTile = kQuantizeThreads * kPerThread;  // elements

// The largest among `threads` neighbouring threads, a power of two up to 256. `warps` is shared memory for a word a warp. With more
// than 32 threads, all of the thread block must call it, which is a barrier.
__device__ inline uint32 largest_among(uint32 largest, int threads, uint32* warps) {
  if (threads >= 32) {
    largest = largest_of_warp(largest);
    if (threads == 32) return largest;
    const int warp = threadIdx.x / 32, group = threads / 32;
    if (threadIdx.x % 32 == 0) warps[warp] = largest;
    __syncthreads();
    return largest_of_warp(warps[(warp & -group) + (threadIdx.x & (group - 1))]);
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= threads) break;
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  return largest;
}

// Quantize with a kind of NearestCode.
template <class Table, class T>
__device__ void quantize_blocks(uint8* codes, float* absmax, const T* x, const float* codebook, int blocksize_shift, int64 n) {
  __shared__ typename Table::Table storage;
  __shared__ uint32 warps[2][kQuantizeThreads / 32];
  constexpr int kEights = kPerThread / 8, kWords = kEights * Table::kWords;
  const int threads = (1 << blocksize_shift) / kPerThread;  // of a block
  const bool first_of_block = (threadIdx.x & (threads - 1)) == 0;
  const bool aligned = reinterpret_cast<size_t>(x) % 16 == 0 && reinterpret_cast<size_t>(codes) % (4 * kWords) == 0;
  // The next tile is under way while this one is worked on, the first while the table is made.
  const uint32 tiles = uint32((n + kQuantizeTile - 1) / kQuantizeTile), whole_tiles = aligned ? uint32(n / kQuantizeTile) : 0;
  const auto position = [](uint32 tile) { return int64(tile) * kQuantizeTile + threadIdx.x * kPerThread; };
  Eight<T> next[kEights];
  const auto load = [&](uint32 tile) {
    const int64 at = position(tile);
#pragma unroll
    for (int i = 0; i < kEights; ++i) next[i].load(x, at + 8 * i, n - at - 8 * i, tile < whole_tiles);
  };
  load(blockIdx.x);
  const Table table(storage, codebook);
  float* const block_absmax = absmax + (threadIdx.x * kPerThread >> blocksize_shift);
  const uint32 blocks = kQuantizeTile >> blocksize_shift;  // of a tile
  // Every thread of the block takes part in each tile, for the barriers; two rows of `warps` in turn make one barrier enough.
  int turn = 0;
  for (uint32 tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
    const bool whole = tile < whole_tiles;
    float values[kEights][8];
    uint32 largest = 0;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      next[i].values(values[i]);
      largest = max(largest, largest_magnitude(next[i]));
    }
    load(tile + gridDim.x);
    largest = largest_among(largest, threads, warps[turn]);
    const int64 here = position(tile);
    if (first_of_block && (whole || here < n)) block_absmax[int64(tile) * blocks] = absmax_from(largest);
    uint32 words[kWords];
    table.find(values, largest, words);
    uint8* const to = codes + here / Table::kPerByte;
    if (whole) {
      if constexpr (kWords == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kWords; ++i) {
        if (here + i * Table::kPerByte < n) to[i] = words[i / 4] >> (i % 4 * 8);
      }
    }
  }
}
