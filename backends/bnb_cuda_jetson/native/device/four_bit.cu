// 4-bit quantization: quantize_4bit and dequantize_4bit.
#include "floats.cuh"
#include "nearest_code.cuh"
#include "quantize_blocks.cuh"
#include "scales.cuh"

constexpr int kThreads = 256;   // of dequantize: one an entry of the codebook of nested scales
constexpr int kRunsAtOnce = 4;  // that each of them has: so many loads are under way at a time

template <bool kNested, class T>
__device__ void dequantize(T* out, const uint8* packed, const Scales& scales, const float* codebook, int blocksize_shift, int64 n) {
  // Sixteen words lie in sixteen banks of shared memory: whatever the codes, a warp looks them up in one go.
  __shared__ float table[16];
  // The codebook of nested scales, so that no load waits for another one.
  __shared__ float nested_table[kNested ? kThreads : 1];
  using Codes = typename Run<T>::Half;
  constexpr int kRun = Run<T>::kLength, kTile = kThreads * kRun * kRunsAtOnce;
  const bool aligned = reinterpret_cast<size_t>(packed) % sizeof(Codes) == 0 && reinterpret_cast<size_t>(out) % 16 == 0;
  const int64 tile = int64(blockIdx.x) * kTile, start = tile + threadIdx.x * kRun;
  const bool simple = aligned && tile + kTile <= n && (!kNested || scales.nested_shift >= 0);
  uint32 codes[kRunsAtOnce];
  typename Scales::Loaded<kNested> loaded[kRunsAtOnce];
  if (simple) {
#pragma unroll
    for (int i = 0; i < kRunsAtOnce; ++i) {
      const int64 at = start + i * kThreads * kRun;
      codes[i] = *reinterpret_cast<const Codes*>(packed + at / 2);
      loaded[i].load(scales, at >> blocksize_shift);
    }
  }
  if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
  if (kNested) nested_table[threadIdx.x] = scales.nested_codebook[threadIdx.x];
  const float offset = kNested ? *scales.nested_offset : 0.0f;
  __syncthreads();
  if (simple) {
#pragma unroll
    for (int i = 0; i < kRunsAtOnce; ++i) {
      const float scale = loaded[i].value(nested_table, offset);
      float values[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) values[j] = __fmul_rn(table[codes[i] >> (4 * (j ^ 1)) & 15], scale);
      Run<T>::store(out + start + i * kThreads * kRun, values);
    }
  } else {
#pragma unroll 1
    for (int64 at = tile + threadIdx.x; at < min(tile + kTile, n); at += kThreads) {
      const int code = packed[at / 2] >> (at % 2 ? 0 : 4) & 15;
      out[at] = from_float<T>(__fmul_rn(table[code], scales.of<kNested>(at >> blocksize_shift)));
    }
  }
}

#define DEQUANTIZE_4BIT(name, T)                                                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                        \
      dequantize_4bit_##name(T* out, const uint8* packed, Scales scales, const float* codebook, int blocksize_shift, int64 n) { \
    if (scales.nested()) {                                                                                                      \
      dequantize<true>(out, packed, scales, codebook, blocksize_shift, n);                                                      \
    } else {                                                                                                                    \
      dequantize<false>(out, packed, scales, codebook, blocksize_shift, n);                                                     \
    }                                                                                                                           \
  }

DEQUANTIZE_4BIT(float32, float)
DEQUANTIZE_4BIT(float16, __half)
DEQUANTIZE_4BIT(bfloat16, __nv_bfloat16)

#define QUANTIZE_4BIT(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(kQuantizeThreads, 4)                                                         \
      quantize_4bit_##name(uint8* packed, float* absmax, const T* x, const float* codebook, int blocksize_shift, int64 n) { \
    quantize_blocks<NearestCode4bit>(packed, absmax, x, codebook, blocksize_shift, n);                                      \
  }

QUANTIZE_4BIT(float32, float)
QUANTIZE_4BIT(float16, __half)
QUANTIZE_4BIT(bfloat16, __nv_bfloat16)
