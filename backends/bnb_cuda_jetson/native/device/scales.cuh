// Block scales, plain or nested.
#pragma once

#include "floats.cuh"

// The same struct as in native/host/arguments.h.
struct Scales {
  const void* absmax;
  const float* nested_absmax;
  const float* nested_codebook;
  const float* nested_offset;
  int64 nested_blocksize;
  int nested_shift;
  int unused;

  __device__ bool nested() const { return nested_absmax; }

  // The float32 scale of a block; rounded after each of the two operations where scales are nested.
  template <bool kNested>
  __device__ float of(int64 block) const {
    if (!kNested) return static_cast<const float*>(absmax)[block];
    uint8 code = static_cast<const uint8*>(absmax)[block];
    int64 group = nested_shift >= 0 ? block >> nested_shift : block / nested_blocksize;
    return __fadd_rn(__fmul_rn(nested_codebook[code], nested_absmax[group]), *nested_offset);
  }

  // What lies in memory of the scale of a block: loaded without a look at it, and worked out later. Groups of nested scales have a
  // power of two of blocks.
  template <bool kNested>
  struct Loaded {
    float absmax;  // of the block; or of its group, if nested
    uint8 code;

    __device__ void load(const Scales& scales, int64 block) {
      if (kNested) {
        code = static_cast<const uint8*>(scales.absmax)[block];
        absmax = scales.nested_absmax[block >> scales.nested_shift];
      } else {
        absmax = static_cast<const float*>(scales.absmax)[block];
      }
    }

    // `nested_codebook`, `nested_offset`: copies of them.
    __device__ float value(const float* nested_codebook, float nested_offset) const {
      return kNested ? __fadd_rn(__fmul_rn(nested_codebook[code], absmax), nested_offset) : absmax;
    }
  };

  __device__ float operator[](int64 block) const { return nested() ? of<true>(block) : of<false>(block); }
};
