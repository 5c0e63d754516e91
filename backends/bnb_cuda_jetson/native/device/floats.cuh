// The floating-point types, and loads and stores of several elements at a time with float32 values.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using int64 = long long;
using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __uint_as_float(uint32(*reinterpret_cast<uint16*>(&x)) << 16); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two values rounded into 16 bits each, the first in the low half.
template <class T>
__device__ inline uint32 pack_two(float first, float second);
template <>
__device__ inline uint32 pack_two<__half>(float first, float second) {
  __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<uint32*>(&pair);
}
template <>
__device__ inline uint32 pack_two<__nv_bfloat16>(float first, float second) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<uint32*>(&pair);
}

template <class T>
__device__ inline void unpack_two(uint32 pair, float& first, float& second);
template <>
__device__ inline void unpack_two<__half>(uint32 pair, float& first, float& second) {
  float2 values = __half22float2(*reinterpret_cast<__half2*>(&pair));
  first = values.x;
  second = values.y;
}
template <>
__device__ inline void unpack_two<__nv_bfloat16>(uint32 pair, float& first, float& second) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}

// Eight values rounded into 16 bits each.
template <class T>
__device__ inline uint4 pack_eight(const float (&values)[8]) {
  return make_uint4(pack_two<T>(values[0], values[1]), pack_two<T>(values[2], values[3]), pack_two<T>(values[4], values[5]),
                    pack_two<T>(values[6], values[7]));
}

// Eight elements, at an address that is a multiple of 16 bytes.
template <class T>
__device__ inline void load_eight(const T* from, float (&values)[8]) {
  uint4 words = *reinterpret_cast<const uint4*>(from);
  unpack_two<T>(words.x, values[0], values[1]);
  unpack_two<T>(words.y, values[2], values[3]);
  unpack_two<T>(words.z, values[4], values[5]);
  unpack_two<T>(words.w, values[6], values[7]);
}
template <>
__device__ inline void load_eight<float>(const float* from, float (&values)[8]) {
  float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

template <class T>
__device__ inline void store_eight(T* to, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(to) = pack_eight<T>(values);
}
template <>
__device__ inline void store_eight<float>(float* to, const float (&values)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

// Sixteen bytes of elements, which one thread stores at once, and neighbouring threads next to each other: the first to leave the cache
// again. `Codes` holds their 8-bit codes, `Half` their 4-bit ones.
template <class T>
struct Run {
  static constexpr int kLength = 8;
  using Codes = uint2;
  using Half = uint32;

  __device__ static void store(T* to, const float (&values)[8]) { __stcs(reinterpret_cast<uint4*>(to), pack_eight<T>(values)); }
};
template <>
struct Run<float> {
  static constexpr int kLength = 4;
  using Codes = uint32;
  using Half = uint16;

  __device__ static void store(float* to, const float (&values)[4]) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
  }
};

// One of several 8-bit codes in memory's order.
__device__ inline uint32 code_of(uint32 codes, int i) { return codes >> (8 * i) & 255; }
__device__ inline uint32 code_of(uint2 codes, int i) { return code_of(i < 4 ? codes.x : codes.y, i % 4); }

// Eight elements as they lie in memory, `at` and following, of which there are `count` at most. They are loaded without a look at
// them, so that all loads of a thread overlap, and converted later. `vector` says that there are eight, at a multiple of 16 bytes.
template <class T>
struct Eight {
  uint4 words[sizeof(T) / 2];

  __device__ void load(const T* from, int64 at, int64 count, bool vector) {
    if (vector) {
#pragma unroll
      for (int i = 0; i < int(sizeof(T) / 2); ++i) words[i] = reinterpret_cast<const uint4*>(from + at)[i];
    } else {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = i < count ? to_float(from[at + i]) : 0.0f;
      store_eight(reinterpret_cast<T*>(words), values);
    }
  }

  __device__ void values(float* values) const {
    float eight[8];
    load_eight(reinterpret_cast<const T*>(words), eight);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = eight[i];
  }
};

// Round eight values and store them, with the same meaning of the arguments.
template <class T>
__device__ inline void store_values(T* to, int64 at, int64 count, bool vector, const float (&values)[8]) {
  if (vector) {
    store_eight(to + at, values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) to[at + i] = from_float<T>(values[i]);
    }
  }
}
