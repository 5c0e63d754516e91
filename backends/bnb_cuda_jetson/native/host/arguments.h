// What the entry points have in common: arguments as Python passes them, and how many blocks of threads work needs.
#pragma once

#include <cstdint>

#include "driver.h"

namespace bnb {

// Numbers of the floating-point dtypes: indices of tables of kernels. The glue has the same in DTYPES.
enum Dtype { kFloat32, kFloat16, kBfloat16, kDtypes };

inline std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

// log2 of a power of two, -1 for other numbers.
inline int exact_log2(std::int64_t n) {
  if (n <= 0 || (n & (n - 1))) return -1;
  int shift = 0;
  while (n >>= 1) ++shift;
  return shift;
}

// Block scales as kernels get them: float32, or codes of nested scales. The same struct as in native/device/scales.cuh.
struct Scales {
  Address absmax;         // float32, or uint8 where nested_absmax is given
  Address nested_absmax;  // 0 without nested statistics
  Address nested_codebook;
  Address nested_offset;
  std::int64_t nested_blocksize;
  int nested_shift;  // log2 of nested_blocksize, or -1
  int unused = 0;

  Scales(Address absmax, Address nested_absmax, Address nested_codebook, Address nested_offset, std::int64_t nested_blocksize)
      : absmax(absmax),
        nested_absmax(nested_absmax),
        nested_codebook(nested_codebook),
        nested_offset(nested_offset),
        nested_blocksize(nested_blocksize),
        nested_shift(exact_log2(nested_blocksize)) {}
};

}  // namespace bnb
