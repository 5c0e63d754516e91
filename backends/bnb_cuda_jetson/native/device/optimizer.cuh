// Optimizer steps. A warp takes a unit of work at a time, whose lanes hold eight elements each with their states in registers from the
// loads to the stores.
#pragma once

#include "arithmetic.cuh"
#include "blocks.cuh"
#include "floats.cuh"
#include "nearest_code.cuh"
#include "optimizer.h"

constexpr int kPiece = 256;  // elements that a warp has in registers

enum Algorithm { kAdam, kAmsgrad, kAdemamix, kLion, kSgd, kRmsprop, kAdagrad };

// How many states an algorithm may have.
__host__ __device__ constexpr int states_of(int algorithm) {
  return algorithm == kAdam ? 2 : algorithm == kLion || algorithm == kSgd || algorithm == kAdagrad ? 1 : 3;
}

// Whether it has a state in any case; others are there if hyperparameters ask for them.
__device__ constexpr bool always_has(int algorithm, int state) {
  return algorithm == kSgd ? false : algorithm == kRmsprop ? state == 0 : state < states_of(algorithm);
}

// Whether a square root is taken.
__device__ constexpr bool has_root(int algorithm) { return algorithm != kLion && algorithm != kSgd; }

// Subnormal squares may count as 0 from this eps on: beside it their roots vanish.
constexpr float kFlushFrom = 3.637978807091713e-12f;  // 2^-38

// One element: gradient and states before the step -> direction and states after it. `has` says which states there are, and `kFlush`
// that eps is as large as that.
template <int kAlgorithm, bool kFlush>
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
    return divide_roughly(numerator, square_root<kFlush>(square) + s.eps);
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
    const float quotient = divide(g, square_root<kFlush>(square) + s.eps);
    if (!has[1]) return quotient;
    return second = fmaf(second, s.momentum, quotient);
  } else {
    first = first + g * g;
    return divide(g, (square_root<kFlush>(first) + s.eps) * s.slowdown);
  }
}

__device__ inline bool is_updated(const Scalars& s, float grad) { return isfinite(grad) && !(s.skip_zeros && grad == 0.0f); }

// A codebook of states: from codes to values, and back.
struct Codebook {
  // In shared memory.
  struct Table {
    alignas(1024) float values[256];
    NearestCode8bit::Table nearest;
  };

  NearestCode8bit nearest;
  uint32 values;  // their address, a multiple of their size

  Codebook() = default;

  // All threads of the block call it, 256 at least; it ends with a barrier.
  __device__ Codebook(Table& table, const float* codebook) : values(uint32(__cvta_generic_to_shared(table.values))) {
    if (threadIdx.x < 256) table.values[threadIdx.x] = codebook[threadIdx.x];
    nearest = NearestCode8bit(table.nearest, codebook);
  }

  // What a byte of `word` stands for. Written out: with an array subscript, an instruction more adds the address.
  __device__ float value(uint32 word, int byte) const {
    const uint32 address = values | ((byte ? word >> (8 * byte - 2) : word << 2) & 0x3fc);
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
    return value;
  }
};

// ------------------------------------------------------------------------------------------------------------------ tensors in memory

// The tensor that a unit of work is of, which is not before tensor `which`. A unit is a block of a tensor whose states are quantized,
// or else 256 elements.
__device__ inline int tensor_of(const StepTensors& table, int64 unit, int which) {
  while (unit >= table.tensors[which].end) ++which;
  return which;
}

// The number of a unit within its tensor.
__device__ inline int64 block_of(const StepTensors& table, int64 unit, int which) {
  return unit - (which ? table.tensors[which - 1].end : 0);
}

// Eight codes as they lie in memory.
struct EightCodes {
  uint2 words;

  __device__ void load(const uint8* from, int64 at) { words = *reinterpret_cast<const uint2*>(from + at); }
  __device__ float value(const Codebook& codebook, int i) const { return codebook.value(i < 4 ? words.x : words.y, i % 4); }
};

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

// What a lane has of a unit as it lies in memory.
template <class T, int kCount, bool kQuantized>
struct Loaded {
  Eight<T> param, grad;
  typename StateFormat<kQuantized>::Loaded states[kCount];
};

// One element with its states.
template <class T, int kAlgorithm, bool kQuantized>
struct Single {
  using Element = typename StateFormat<kQuantized>::Element;

  float p, g, states[kStates] = {};
  bool has[kStates] = {};

  __device__ Single(const StepTensor& tensor, int64 at, const Codebook* codebooks, const float (&absmax)[states_of(kAlgorithm)])
      : p(to_float(static_cast<const T*>(tensor.param)[at])), g(to_float(static_cast<const T*>(tensor.grad)[at])) {
#pragma unroll
    for (int k = 0; k < states_of(kAlgorithm); ++k) {
      has[k] = tensor.states[k];
      if (!has[k]) continue;
      const Element state = static_cast<const Element*>(tensor.states[k])[at];
      if constexpr (kQuantized) {
        states[k] = __fmul_rn(codebooks[k].value(state, 0), absmax[k]);
      } else {
        states[k] = state;
      }
    }
  }

  // Bring the states up to date, and return the direction; 0 where nothing is to change.
  __device__ float direction(const Scalars& s) {
    if (!is_updated(s, g)) return 0.0f;
    const float scaled = g * s.gnorm_scale;
    return update<kAlgorithm, false>(s, s.weight_decay != 0.0f ? fmaf(s.weight_decay, p, scaled) : scaled, states, has);
  }
};

// Eight elements, in registers with their states.
template <class T, int kAlgorithm, bool kQuantized>
struct Piece {
  static constexpr int kCount = states_of(kAlgorithm);

  const StepTensor& tensor;
  const int64 at;
  bool has[kStates];
  float p[8], states[kCount][8];

  __device__ Piece(const StepTensor& tensor, int64 at) : tensor(tensor), at(at) {
#pragma unroll
    for (int k = 0; k < kStates; ++k) has[k] = always_has(kAlgorithm, k) || (k < kCount && tensor.states[k]);
  }

  __device__ void load(Loaded<T, kCount, kQuantized>& loaded) const {
    loaded.param.load(static_cast<const T*>(tensor.param), at, 8, true);
    loaded.grad.load(static_cast<const T*>(tensor.grad), at, 8, true);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      loaded.states[k] = {};
      if (!has[k]) continue;
      if constexpr (kQuantized) {
        loaded.states[k].load(static_cast<const uint8*>(tensor.states[k]), at);
      } else {
        loaded.states[k].load(static_cast<const float*>(tensor.states[k]), at, 8, true);
      }
    }
  }

  // Whether all gradients of the warp are finite.
  __device__ bool is_finite(const Loaded<T, kCount, kQuantized>& loaded) const {
    float g[8], zero = 0.0f;  // a sum of products with zero is zero if all factors are finite
    loaded.grad.values(g);
#pragma unroll
    for (int i = 0; i < 8; ++i) zero = fmaf(g[i], 0.0f, zero);
    return __all_sync(0xffffffffu, zero == 0.0f);
  }

  // Take the step, in registers.
  template <bool kFlush>
  __device__ void step(const Loaded<T, kCount, kQuantized>& loaded, const Scalars& s, float rate, const Codebook* codebooks,
                       const float (&absmax)[kCount]) {
    float g[8];
    loaded.param.values(p);
    loaded.grad.values(g);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if constexpr (kQuantized) {
#pragma unroll
        for (int i = 0; i < 8; ++i) states[k][i] = __fmul_rn(loaded.states[k].value(codebooks[k], i), absmax[k]);
      } else {
        loaded.states[k].values(states[k]);
      }
    }
    if (s.gnorm_scale != 1.0f) {
#pragma unroll
      for (int i = 0; i < 8; ++i) g[i] *= s.gnorm_scale;
    }
    if (s.weight_decay != 0.0f) {
#pragma unroll
      for (int i = 0; i < 8; ++i) g[i] = fmaf(s.weight_decay, p[i], g[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float now[kStates] = {};
#pragma unroll
      for (int k = 0; k < kCount; ++k) now[k] = states[k][i];
      const float direction = update<kAlgorithm, kFlush>(s, g[i], now, has);
      p[i] = fmaf(-rate, direction, p[i] * s.decay);
#pragma unroll
      for (int k = 0; k < kCount; ++k) states[k][i] = now[k];
    }
  }

  // The largest magnitudes of the warp's states, as bits.
  __device__ void compare(uint32 (&largest)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) largest[k] = largest_of_warp(largest_magnitude(states[k]));
  }

  __device__ void store(const Codebook* codebooks, const uint32 (&largest)[kCount]) const {
    store_eight(static_cast<T*>(tensor.param) + at, p);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!has[k]) continue;
      if constexpr (kQuantized) {
        uint32 words[2];
        codebooks[k].nearest.find(reinterpret_cast<const float(&)[1][8]>(states[k]), largest[k], words);
        *reinterpret_cast<uint2*>(static_cast<uint8*>(tensor.states[k]) + at) = make_uint2(words[0], words[1]);
      } else {
        store_eight(static_cast<float*>(tensor.states[k]) + at, states[k]);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------------------- the step

// A block of any size is gone over twice: for the absmax of its new states, and to store them.
template <class T, int kAlgorithm, bool kQuantized>
__device__ void step_singly(const StepTensor& tensor, int64 start, int64 end, const Scalars& s, float rate,
                            const Codebook* codebooks, const float (&absmax)[states_of(kAlgorithm)],
                            uint32 (&largest)[states_of(kAlgorithm)]) {
  constexpr int kCount = states_of(kAlgorithm);
#pragma unroll 1
  for (int pass = kQuantized ? 0 : 1; pass < 2; ++pass) {
#pragma unroll 1
    for (int64 at = start + threadIdx.x % 32; at < end; at += 32) {
      Single<T, kAlgorithm, kQuantized> single(tensor, at, codebooks, absmax);
      const float direction = single.direction(s);
      if (pass == 1 && is_updated(s, single.g)) {
        static_cast<T*>(tensor.param)[at] = from_float<T>(fmaf(-rate, direction, single.p * s.decay));
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const float state[1] = {single.states[k]};
        if (pass == 0) {
          largest[k] = max(largest[k], largest_magnitude(state));
        } else if (!single.has[k]) {
        } else if constexpr (kQuantized) {
          static_cast<uint8*>(tensor.states[k])[at] = codebooks[k].nearest.code(state[0], largest[k], scale_from(largest[k]));
        } else {
          static_cast<float*>(tensor.states[k])[at] = state[0];
        }
      }
    }
    if (pass == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) largest[k] = largest_of_warp(largest[k]);
    }
  }
}

// Add up the squares of a unit's parameters and directions.
template <class T, int kAlgorithm, bool kQuantized>
__device__ double2 measure(const StepTensor& tensor, int64 start, int64 end, const Scalars& s, const Codebook* codebooks,
                           const float (&absmax)[states_of(kAlgorithm)]) {
  double2 sum = make_double2(0.0, 0.0);
#pragma unroll 1
  for (int64 at = start + threadIdx.x % 32; at < end; at += 32) {
    Single<T, kAlgorithm, kQuantized> single(tensor, at, codebooks, absmax);
    const double direction = single.direction(s);
    sum.x += double(single.p) * single.p;
    sum.y += direction * direction;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, distance);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, distance);
  }
  return sum;
}

// Update all tensors; or, if `sums` is given, only measure their units. `kWarps`: of the block of threads.
template <class T, int kAlgorithm, bool kQuantized, int kWarps>
__device__ void step(const StepTensors& table, const Scalars& scalars, const Scalars* device_scalars, const float* ratios,
                     double2* sums, const Codebook* codebooks, int64 blocksize) {
  constexpr int kCount = states_of(kAlgorithm);
  const Scalars s = device_scalars ? *device_scalars : scalars;
  const bool by_pieces = !sums && !s.skip_zeros && (!kQuantized || blocksize == kPiece);
  int which = 0;
  for (int64 unit = int64(blockIdx.x) * kWarps + threadIdx.x / 32; unit < table.units; unit += int64(gridDim.x) * kWarps) {
    which = tensor_of(table, unit, which);
    const StepTensor& tensor = table.tensors[which];
    const int64 block = block_of(table, unit, which);
    const float rate = ratios ? s.lr * ratios[which] : s.lr;
    float absmax[kCount] = {};
    if constexpr (kQuantized) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (always_has(kAlgorithm, k) || tensor.states[k]) absmax[k] = tensor.absmax[k][block];
      }
    }
    uint32 largest[kCount] = {};
    bool done = false;
    if (by_pieces && (block + 1) * kPiece <= tensor.n) {
      Piece<T, kAlgorithm, kQuantized> piece(tensor, block * kPiece + threadIdx.x % 32 * 8);
      Loaded<T, kCount, kQuantized> loaded;
      piece.load(loaded);
      // The step is right if all gradients are finite. A state whose absmax is worked out shows that: it would not be finite either.
      const bool by_state = kQuantized && piece.has[0];
      done = by_state || piece.is_finite(loaded);
      if (kQuantized && has_root(kAlgorithm) && s.eps >= kFlushFrom) {
        piece.template step<true>(loaded, s, rate, codebooks, absmax);
      } else {
        piece.template step<false>(loaded, s, rate, codebooks, absmax);
      }
      if (kQuantized) piece.compare(largest);
      if (by_state) done = largest[0] < kInfinityBits;
      if (done) piece.store(codebooks, largest);
    }
    if (!done) {
      const int64 start = block * blocksize, end = min(start + blocksize, abs(tensor.n));
      if (sums) {
        const double2 sum = measure<T, kAlgorithm, kQuantized>(tensor, start, end, s, codebooks, absmax);
        if (threadIdx.x % 32 == 0) sums[unit] = sum;
        continue;
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) largest[k] = 0;
      step_singly<T, kAlgorithm, kQuantized>(tensor, start, end, s, rate, codebooks, absmax, largest);
    }
    if constexpr (kQuantized) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (threadIdx.x % 32 == 0 && (always_has(kAlgorithm, k) || tensor.states[k])) {
          tensor.absmax[k][block] = absmax_from(largest[k]);
        }
      }
    }
  }
}
