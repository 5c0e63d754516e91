// A 4-bit weight as kernels get it, and what the entry points of its products share.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "launch.h"

namespace bnb {

// The same struct as in native/device/weight_4bit.cuh.
struct Weight4bit {
  Address packed;
  Scales scales;
  Address codebook;
  std::int64_t N;
  std::int64_t K;
  std::int64_t first_block = 0;
  int blocksize_shift;
  int unused = 0;

  Weight4bit(Address packed, const Scales& scales, Address codebook, std::int64_t blocksize, std::int64_t N, std::int64_t K)
      : packed(packed), scales(scales), codebook(codebook), N(N), K(K), blocksize_shift(exact_log2(blocksize)) {}
};

constexpr std::int64_t kMostGridRows = 65535;  // what a grid may have in its second dimension

// Rows of x are tiles in a grid's second dimension: as many launches as that needs.
template <class Launch>
void by_rows(std::int64_t rows, std::int64_t tile, Launch launch_rows) {
  for (std::int64_t first = 0; first < rows; first += kMostGridRows * tile) launch_rows(first, std::min(rows - first, kMostGridRows * tile));
}

// x W^T + bias for any shape and alignment.
void multiply_any(const Call& call, int dtype, Address out, Address x, const Weight4bit& weight, Address bias, std::int64_t M);

}  // namespace bnb
