// Optimizer steps. A warp takes a unit of work at a time: a block of a tensor whose states are quantized, or else 256 elements. Each
// lane holds eight elements with their states in registers from the loads to the stores.
#pragma once

#include "arithmetic.cuh"
#include "floats.cuh"
#include "nearest_code.cuh"
#include "optimizer.h"
#include "quantize_blocks.cuh"

constexpr int kPiece = 256;        // elements that a warp has in registers

enum Algorithm { kAdam, kAmsgrad, kAdemamix, kLion, kSgd, kRmsprop, kAdagrad };

// How many states an algorithm may have.
__host__ __device__ constexpr int states_of(int algorithm) {
  return algorithm == kAdam ? 2 : algorithm == kLion || algorithm == kSgd || algorithm == kAdagrad ? 1 : 3;
}

// Whether it has a state in any case; others are there if hyperparameters ask for them.
__device__ constexpr bool always_has(int algorithm, int state) {
  return algorithm == kSgd ? false : algorithm == kRmsprop ? state == 0 : state < states_of(algorithm);
}

// One element: gradient and states before the step -> direction and states after it. `has` says which states there are.
template <int kAlgorithm>
__device__ inline float update(const Scalars& s, float g, float (&states)[kStates], const bool (&has)[kStates]) {
  float &first = states[0], &second = states[1], &third = states[2];
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

// The gradient that the algorithm gets.
__device__ inline float prepared(const Scalars& s, float grad, float param) {
  const float scaled = grad * s.gnorm_scale;
  float decayed = fmaf(s.weight_decay, param, scaled);
  settle(decayed);
  return s.weight_decay != 0.0f ? decayed : scaled;
}

__device__ inline bool is_updated(const Scalars& s, float grad) { return isfinite(grad) && !(s.skip_zeros && grad == 0.0f); }

__device__ inline uint32 largest_of_warp(uint32 largest) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, largest);
#else
  for (int distance = 16; distance > 0; distance /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  return largest;
#endif
}

// ------------------------------------------------------------------------------------------------------------------ tensors in memory

// What a warp works on: elements of one tensor.
struct Unit {
  const StepTensor& tensor;
  int64 block, start, end;
  bool aligned;  // eight elements from a multiple of eight have addresses for vector loads

  __device__ Unit(const StepTensor& tensor, int64 block, int64 blocksize)
      : tensor(tensor), block(block), start(block * blocksize), aligned(tensor.n > 0 && blocksize % 8 == 0) {
    end = min(start + blocksize, abs(tensor.n));
  }
};

// Eight codes as they lie in memory; otherwise as `Eight`.
struct EightCodes {
  uint2 words;

  __device__ void load(const uint8* from, int64 at, int64 count, bool vector) {
    if (vector) {
      words = *reinterpret_cast<const uint2*>(from + at);
    } else {
      words = make_uint2(0, 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) (i < 4 ? words.x : words.y) |= i < count ? uint32(from[at + i]) << (i % 4 * 8) : 0;
    }
  }

  __device__ uint32 operator[](int i) const { return (i < 4 ? words.x : words.y) >> (i % 4 * 8) & 255; }
};

__device__ inline void store_codes(uint8* to, int64 at, int64 count, bool vector, const uint32 (&codes)[8]) {
  if (vector) {
    *reinterpret_cast<uint2*>(to + at) = make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24,
                                                    codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) to[at + i] = codes[i];
    }
  }
}

template <bool kQuantized>
struct StateFormat {
  using Element = float;
  using Loaded = Eight<float>;
};
template <>
struct StateFormat<true> {
  using Element = uint8;
  using Loaded = EightCodes;
};

// What a lane has of a unit: eight elements at most, with their states.
template <class T, int kAlgorithm, bool kQuantized>
struct Piece {
  static constexpr int kCount = states_of(kAlgorithm);
  using Format = StateFormat<kQuantized>;

  const Unit& unit;
  int64 at;
  int count;
  bool vector, has[kStates];
  float p[8], states[kCount][8];

  __device__ Piece(const Unit& unit, int64 start) : unit(unit) {
    at = start + threadIdx.x % 32 * 8;
    count = int(max(min(unit.end - at, int64(8)), int64(0)));
    vector = unit.aligned && count == 8;
#pragma unroll
    for (int k = 0; k < kStates; ++k) has[k] = always_has(kAlgorithm, k) || (k < kCount && unit.tensor.states[k]);
  }

  // Take the step, in registers.
  __device__ void step(const Scalars& s, float rate, const NearestCode8bit* codebooks, const float (&absmax)[kCount]) {
    Eight<T> param, grad;
    typename Format::Loaded loaded[kCount];
    if (vector) {
      load(param, grad, loaded, true);
    } else {
      load(param, grad, loaded, false);
    }
    float g[8];
    param.values(p);
    grad.values(g);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if constexpr (kQuantized) {
#pragma unroll
        for (int i = 0; i < 8; ++i) states[k][i] = __fmul_rn(codebooks[k].value(loaded[k][i]), absmax[k]);
        if (!vector) {
#pragma unroll
          for (int i = 0; i < 8; ++i) states[k][i] = i < count ? states[k][i] : 0.0f;  // which does not raise the absmax
        }
      } else {
        loaded[k].values(states[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float after[kStates] = {};
#pragma unroll
      for (int k = 0; k < kCount; ++k) after[k] = states[k][i];
      const float direction = update<kAlgorithm>(s, prepared(s, g[i], p[i]), after, has);
      float moved = fmaf(-rate, direction, p[i] * s.decay);
      settle(moved);
      const bool updated = is_updated(s, g[i]);
      if (updated) p[i] = moved;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        settle(after[k]);
        if (updated) states[k][i] = after[k];
      }
    }
  }

  // Include the states' magnitudes in `largest`.
  __device__ void compare(uint32 (&largest)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) largest[k] = max(largest[k], largest_magnitude(states[k]));
  }

  __device__ void store(const NearestCode8bit* codebooks, const uint32 (&largest)[kCount]) const {
    store_values(static_cast<T*>(unit.tensor.param), at, count, vector, p);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!has[k]) continue;
      if constexpr (kQuantized) {
        const float scale = scale_from(largest[k]);
        float scaled[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) scaled[i] = largest[k] < kInfinityBits ? __fmul_rn(states[k][i], scale) : 0.0f;
        uint32 codes[8];
        codebooks[k].find(scaled, codes);
        store_codes(static_cast<uint8*>(unit.tensor.states[k]), at, count, vector, codes);
      } else {
        store_values(static_cast<float*>(unit.tensor.states[k]), at, count, vector, states[k]);
      }
    }
  }

 private:
  __device__ void load(Eight<T>& param, Eight<T>& grad, typename Format::Loaded (&loaded)[kCount], bool vector) const {
    param.load(static_cast<const T*>(unit.tensor.param), at, count, vector);
    grad.load(static_cast<const T*>(unit.tensor.grad), at, count, vector);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      loaded[k] = {};
      if (has[k]) loaded[k].load(static_cast<const typename Format::Element*>(unit.tensor.states[k]), at, count, vector);
    }
  }
};

// ------------------------------------------------------------------------------------------------------------------------- the step

template <class T, int kAlgorithm, bool kQuantized>
__device__ void step_unit(const Unit& unit, int64 blocksize, const Scalars& s, float rate, const NearestCode8bit* codebooks,
                          const float (&absmax)[states_of(kAlgorithm)]) {
  constexpr int kCount = states_of(kAlgorithm);
  // A block that a warp cannot hold is gone over twice: for the absmax of its new states, and to store them.
  const bool held = blocksize <= kPiece;
  uint32 largest[kCount] = {};
  int pass = held ? 1 : 0;
  for (int64 start = unit.start; pass < 2;) {
    Piece<T, kAlgorithm, kQuantized> piece(unit, start);
    piece.step(s, rate, codebooks, absmax);
    start += kPiece;
    const bool last = start >= unit.end;
    if (kQuantized && (held || pass == 0)) {
      piece.compare(largest);
      if (last) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) largest[k] = largest_of_warp(largest[k]);
      }
    }
    if (pass == 1) piece.store(codebooks, largest);
    if (last) start = unit.start, ++pass;
  }
  if constexpr (kQuantized) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (threadIdx.x % 32 == 0 && (always_has(kAlgorithm, k) || unit.tensor.states[k])) {
        unit.tensor.absmax[k][unit.block] = absmax_from(largest[k]);
      }
    }
  }
}

// Add up the squares of a unit's parameters and directions. Large steps of few elements at a time are not worth their code here.
template <class T, int kAlgorithm, bool kQuantized>
__device__ double2 measure_unit(const Unit& unit, const Scalars& s, const NearestCode8bit* codebooks,
                                const float (&absmax)[states_of(kAlgorithm)]) {
  const StepTensor& tensor = unit.tensor;
  double2 sum = make_double2(0.0, 0.0);
#pragma unroll 1
  for (int64 at = unit.start + threadIdx.x % 32; at < unit.end; at += 32) {
    bool has[kStates] = {};
    float states[kStates] = {};
#pragma unroll
    for (int k = 0; k < states_of(kAlgorithm); ++k) {
      has[k] = tensor.states[k];
      if (!has[k]) continue;
      if constexpr (kQuantized) {
        states[k] = __fmul_rn(codebooks[k].value(static_cast<const uint8*>(tensor.states[k])[at]), absmax[k]);
      } else {
        states[k] = static_cast<const float*>(tensor.states[k])[at];
      }
    }
    const float p = to_float(static_cast<const T*>(tensor.param)[at]), g = to_float(static_cast<const T*>(tensor.grad)[at]);
    const double direction = is_updated(s, g) ? update<kAlgorithm>(s, prepared(s, g, p), states, has) : 0.0f;
    sum.x += double(p) * p;
    sum.y += direction * direction;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, distance);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, distance);
  }
  return sum;
}

// Update all tensors; or, if `sums` is given, only measure their units.
template <class T, int kAlgorithm, bool kQuantized>
__device__ void step(const StepTensors& table, const Scalars& scalars, const Scalars* device_scalars, const float* ratios,
                     double2* sums, const NearestCode8bit* codebooks, int64 blocksize) {
  const Scalars s = device_scalars ? *device_scalars : scalars;
  int which = 0;
  const int64 stride = int64(gridDim.x) * blockDim.x / 32;
  for (int64 at = (int64(blockIdx.x) * blockDim.x + threadIdx.x) / 32; at < table.units; at += stride) {
    while (at >= table.tensors[which].end) ++which;
    const Unit unit(table.tensors[which], at - (which ? table.tensors[which - 1].end : 0), blocksize);
    float absmax[states_of(kAlgorithm)] = {};
    if constexpr (kQuantized) {
#pragma unroll
      for (int k = 0; k < states_of(kAlgorithm); ++k) {
        if (always_has(kAlgorithm, k) || unit.tensor.states[k]) absmax[k] = unit.tensor.absmax[k][unit.block];
      }
    }
    if (sums) {
      const double2 sum = measure_unit<T, kAlgorithm, kQuantized>(unit, s, codebooks, absmax);
      if (threadIdx.x % 32 == 0) sums[at] = sum;
    } else {
      const float rate = ratios ? s.lr * ratios[which] : s.lr;
      step_unit<T, kAlgorithm, kQuantized>(unit, blocksize, s, rate, codebooks, absmax);
    }
  }
}
