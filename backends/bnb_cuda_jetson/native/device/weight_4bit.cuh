// A 4-bit weight as the kernels that multiply by it see it.
#pragma once

#include "scales.cuh"

// The same struct as in native/host/weight_4bit.h.
struct Weight4bit {
  const uint8* packed;
  Scales scales;
  const float* codebook;
  int64 N;            // rows
  int64 K;            // columns
  int64 first_block;  // of this weight among those of `scales`, which several experts share
  int blocksize_shift;
  int unused;

  __device__ float value(int64 row, int64 column) const {
    const int64 element = row * K + column;
    const uint8 byte = packed[element >> 1];
    return __fmul_rn(codebook[element & 1 ? byte & 15 : byte >> 4], scales[first_block + (element >> blocksize_shift)]);
  }

  // The weight of an expert. No byte and no block belongs to two of them.
  __device__ Weight4bit expert(int64 number) const {
    Weight4bit weight = *this;
    weight.packed += number * ((N * K + 1) >> 1);
    weight.first_block += number * ((N * K + (int64(1) << blocksize_shift) - 1) >> blocksize_shift);
    return weight;
  }
};

// Rows of x that belong to an expert.
struct Tokens {
  int64 expert;
  int64 first;
  int64 count;  // 0 if there are no such rows
};

// The number-th piece of up to `size` rows that belong to one expert. There are at most rows / size + experts pieces.
__device__ inline Tokens piece_of_tokens(const int* offsets, int experts, int64 number, int size) {
  for (int expert = 0; expert < experts; ++expert) {
    const int64 first = offsets[expert], count = offsets[expert + 1] - first, pieces = (count + size - 1) / size;
    if (number < pieces) return {expert, first + number * size, min(count - number * size, int64(size))};
    number -= pieces;
  }
  return {0, 0, 0};
}
