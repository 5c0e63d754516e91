// Optimizer steps. A warp takes a unit of work at a time: a block of a tensor whose states are quantized, or else 256 elements. Each
// lane holds eight elements with their states in registers from the loads to the stores.
#pragma once

#include "arithmetic.cuh"
#include "floats.cuh"
#include "nearest_code.cuh"
#include "optimizer.h"
#include "quantize_blocks.cuh"

constexpr int kStepThreads = 320;  // two blocks of threads have 96 registers each
constexpr int kPiece = 256;  // elements that a warp has in registers

enum Algorithm { kAdam, kAmsgrad, kAdemamix, kLion, kSgd, kRmsprop, kAdagrad };

// How many states an algorithm may have.
__host__ __device__ constexpr int states_of(int algorithm) {
  return algorithm == kAdam ? 2 : algorithm == kLion || algorithm == kSgd || algorithm == kAdagrad ? 1 : 3;
}

// One element: gradient and states before the step -> direction and states after it. `has` says which states there are.
template <int kAlgorithm>
__device__ inline float update(const Scalars& s, float g, float& first, float& second, float& third, const bool (&has)[kStates]) {
  if constexpr (kAlgorithm == kAdam || kAlgorithm == kAmsgrad || kAlgorithm == kAdemamix) {
    first = fmaf(first, s.beta1, g * s.new1);
    second = fmaf(second, s.beta2, g * g * s.new2);
    float numerator = first * s.numerator, square = second;
    if constexpr (kAlgorithm == kAmsgrad) square = third = fmaxf(third, second);
    if constexpr (kAlgorithm == kAdemamix) {
      third = fmaf(third, s.beta3, g * s.new3);
      numerator = fmaf(third, s.alpha, numerator);
    }
    return divide(numerator, square_root(square) + s.eps);
  } else if constexpr (kAlgorithm == kLion) {
    const float mean = fmaf(first, s.beta1, g * s.new1);
    first = fmaf(first, s.beta2, g * s.new2);
    return mean > 0.0f ? 1.0f : mean < 0.0f ? -1.0f : mean;
  } else if constexpr (kAlgorithm == kSgd) {
    if (!has[0]) return g;
    first = s.first_step ? g : fmaf(first, s.momentum, g * s.undamped);
    return s.nesterov ? fmaf(first, s.momentum, g) : first;
  } else if constexpr (kAlgorithm == kRmsprop) {
    first = fmaf(first, s.beta2, g * g * s.new2);
    float square = first;
    if (has[2]) {
      third = fmaf(third, s.beta2, g * s.new2);
      square = fmaxf(first - third * third, 0.0f);
    }
    const float quotient = divide(g, square_root(square) + s.eps);
    if (!has[1]) return quotient;
    return second = fmaf(second, s.momentum, quotient);
  } else {
    first = first + g * g;
    return divide(g, (square_root(first) + s.eps) * s.slowdown);
  }
}

// ------------------------------------------------------------------------------------------------------------------ states in memory

template <class T>
__device__ inline void load_piece(const T* from, int lane_elements, bool vector, float (&values)[8]) {
  if (vector) {
    load_eight(from, values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < lane_elements ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
__device__ inline void store_piece(T* to, int lane_elements, bool vector, const float (&values)[8]) {
  if (vector) {
    store_eight(to, values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < lane_elements) to[i] = from_float<T>(values[i]);
    }
  }
}

__device__ inline uint2 load_codes(const uint8* from, int lane_elements, bool vector) {
  if (vector) return *reinterpret_cast<const uint2*>(from);
  uint2 codes = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < lane_elements) codes.x |= uint32(from[i]) << (8 * i);
    if (i + 4 < lane_elements) codes.y |= uint32(from[i + 4]) << (8 * i);
  }
  return codes;
}

__device__ inline void store_codes(uint8* to, int lane_elements, bool vector, uint2 codes) {
  if (vector) {
    *reinterpret_cast<uint2*>(to) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < lane_elements) to[i] = codes.x >> (8 * i);
      if (i + 4 < lane_elements) to[i + 4] = codes.y >> (8 * i);
    }
  }
}

__device__ inline uint32 largest_of_warp(uint32 largest) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, largest);
#else
  for (int distance = 16; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  return largest;
#endif
}

// ------------------------------------------------------------------------------------------------------------------------- the step

// What a lane has of a unit: eight elements at most.
struct Piece {
  int64 at;     // of the first
  int count;
  bool vector;  // all eight, at addresses for vector loads

  __device__ Piece(int64 start, int64 end, bool aligned) {
    at = start + threadIdx.x % 32 * 8;
    count = int(max(min(end - at, int64(8)), int64(0)));
    vector = aligned && count == 8;
  }
};

// Parameters and states of a piece after the step, in registers.
template <class T, int kAlgorithm, bool kQuantized>
struct Update {
  static constexpr int kCount = states_of(kAlgorithm);
  float p[8], states[kCount][8];
  double param_square = 0.0, direction_square = 0.0;  // where they are measured

  template <bool kMeasure>
  __device__ void compute(const StepTensor& tensor, const Piece& piece, const Scalars& s, float rate, const NearestCode8bit* codebooks,
                          const float (&absmax)[kCount]) {
    const bool has[kStates] = {tensor.states[0] != nullptr, tensor.states[1] != nullptr, tensor.states[2] != nullptr};
    float g[8];
    load_piece(static_cast<const T*>(tensor.param) + piece.at, piece.count, piece.vector, p);
    load_piece(static_cast<const T*>(tensor.grad) + piece.at, piece.count, piece.vector, g);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!has[k]) continue;
      if constexpr (kQuantized) {
        const uint2 codes = load_codes(static_cast<const uint8*>(tensor.states[k]) + piece.at, piece.count, piece.vector);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32 code = (i < 4 ? codes.x : codes.y) >> (i % 4 * 8) & 255;
          states[k][i] = __fmul_rn(codebooks[k].values[code], absmax[k]);
        }
      } else {
        load_piece(static_cast<const float*>(tensor.states[k]) + piece.at, piece.count, piece.vector, states[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool updated = isfinite(g[i]) && !(s.skip_zeros && g[i] == 0.0f) && i < piece.count;
      float gradient = g[i] * s.gnorm_scale;
      if (s.weight_decay != 0.0f) gradient = fmaf(s.weight_decay, p[i], gradient);
      float after[kStates] = {};
#pragma unroll
      for (int k = 0; k < kCount; ++k) after[k] = states[k][i];
      const float direction = update<kAlgorithm>(s, gradient, after[0], after[1], after[2], has);
      if constexpr (kMeasure) {
        if (i < piece.count) param_square += double(p[i]) * p[i];
        if (updated) direction_square += double(direction) * direction;
      }
      if (updated) {
        p[i] = fmaf(-rate, direction, p[i] * s.decay);
#pragma unroll
        for (int k = 0; k < kCount; ++k) states[k][i] = after[k];
      }
    }
  }

  // Include the states' magnitudes in `largest`.
  __device__ void compare(const Piece& piece, uint32 (&largest)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < piece.count) largest[k] = max(largest[k], magnitude_bits(states[k][i]));
      }
    }
  }

  __device__ void store(const StepTensor& tensor, const Piece& piece, const NearestCode8bit* codebooks,
                        const uint32 (&largest)[kCount]) const {
    store_piece(static_cast<T*>(tensor.param) + piece.at, piece.count, piece.vector, p);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!tensor.states[k]) continue;
      if constexpr (kQuantized) {
        const auto layout = codebooks[k].layout();
        const float scale = scale_from(largest[k]);
        uint32 codes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = largest[k] >= kInfinityBits ? 0.0f : states[k][i];
          codes[i] = codebooks[k].code(layout, __fmul_rn(value, scale));
        }
        store_codes(static_cast<uint8*>(tensor.states[k]) + piece.at, piece.count, piece.vector,
                    make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24,
                               codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24));
      } else {
        store_piece(static_cast<float*>(tensor.states[k]) + piece.at, piece.count, piece.vector, states[k]);
      }
    }
  }
};

// Update all tensors; or, with kMeasure, only add up the squares of each unit's parameters and directions.
template <class T, int kAlgorithm, bool kQuantized, bool kMeasure>
__device__ void step(const StepTensors& table, const Scalars& s, const float* ratios, double2* sums, const NearestCode8bit* codebooks,
                     int64 blocksize) {
  constexpr int kCount = states_of(kAlgorithm);
  const int lane = threadIdx.x % 32;
  int which = 0;
  const int64 stride = int64(gridDim.x) * kStepThreads / 32;
  for (int64 unit = (int64(blockIdx.x) * kStepThreads + threadIdx.x) / 32; unit < table.units; unit += stride) {
    while (unit >= table.tensors[which].end) ++which;
    const StepTensor& tensor = table.tensors[which];
    const int64 block = unit - (which ? table.tensors[which - 1].end : 0);
    const int64 n = abs(tensor.n), start = block * blocksize, end = min(start + blocksize, n);
    const bool aligned = tensor.n > 0 && blocksize % 8 == 0;
    const float rate = ratios ? s.lr * ratios[which] : s.lr;
    float absmax[kCount] = {};
    if constexpr (kQuantized) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) absmax[k] = tensor.states[k] ? tensor.absmax[k][block] : 0.0f;
    }
    Update<T, kAlgorithm, kQuantized> update;
    if constexpr (kMeasure) {
      for (int64 piece = start; piece < end; piece += kPiece) {
        update.template compute<true>(tensor, Piece(piece, end, aligned), s, rate, codebooks, absmax);
      }
      for (int distance = 16; distance > 0; distance /= 2) {
        update.param_square += __shfl_xor_sync(0xffffffffu, update.param_square, distance);
        update.direction_square += __shfl_xor_sync(0xffffffffu, update.direction_square, distance);
      }
      if (lane == 0) sums[unit] = make_double2(update.param_square, update.direction_square);
    } else {
      // A block that a warp cannot hold is gone over twice: for the absmax of its new states, and to store them.
      const bool held = blocksize <= kPiece;
      uint32 largest[kCount] = {};
      for (int64 piece = start, pass = held ? 1 : 0; pass < 2;) {
        const Piece mine(piece, end, aligned);
        update.template compute<false>(tensor, mine, s, rate, codebooks, absmax);
        if (kQuantized && (held || pass == 0)) update.compare(mine, largest);
        piece += kPiece;
        const bool last = piece >= end;
        if (kQuantized && last && (held || pass == 0)) {
#pragma unroll
          for (int k = 0; k < kCount; ++k) largest[k] = largest_of_warp(largest[k]);
        }
        if (pass == 1) update.store(tensor, mine, codebooks, largest);
        if (last) piece = start, ++pass;
      }
      if (kQuantized && lane == 0) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (tensor.states[k]) tensor.absmax[k][block] = absmax_from(largest[k]);
        }
      }
    }
  }
}

template <class T, int kAlgorithm, bool kQuantized>
__device__ void step_or_measure(const StepTensors& table, const Scalars& scalars, const Scalars* device_scalars, const float* ratios,
                                double2* sums, const NearestCode8bit* codebooks, int64 blocksize) {
  const Scalars s = device_scalars ? *device_scalars : scalars;
  if (sums) {
    step<T, kAlgorithm, kQuantized, true>(table, s, ratios, sums, codebooks, blocksize);
  } else {
    step<T, kAlgorithm, kQuantized, false>(table, s, ratios, sums, codebooks, blocksize);
  }
}
