// 4-bit quantization: quantize_4bit and dequantize_4bit.
#include "floats.cuh"
#include "nearest_code.cuh"
#include "quantize_blocks.cuh"
#include "scales.cuh"

constexpr int kThreads = 256;    // of dequantize
constexpr int kTilesAtOnce = 4;  // tiles of eight elements a thread: loads in flight of each thread

template <class T>
__device__ void dequantize(T* out, const uint8* packed, const Scales& scales, const float* codebook, int blocksize_shift, int64 n) {
  // Sixteen words lie in sixteen banks of shared memory: whatever the codes, a warp looks them up in one go.
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  const bool by_eight = reinterpret_cast<size_t>(packed) % 4 == 0 && reinterpret_cast<size_t>(out) % 16 == 0;
  const int64 end = by_eight ? n / 8 * 8 : 0;
  const int64 tile = int64(kThreads) * 8;
  for (int64 start = blockIdx.x * tile * kTilesAtOnce; start < end; start += gridDim.x * tile * kTilesAtOnce) {
    uint32 codes[kTilesAtOnce];
    float scale[kTilesAtOnce];
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int64 at = min(start + i * tile + threadIdx.x * 8, end - 8);
      codes[i] = *reinterpret_cast<const uint32*>(packed + at / 2);
      scale[i] = scales[at >> blocksize_shift];
    }
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int64 at = start + i * tile + threadIdx.x * 8;
      float values[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = __fmul_rn(table[codes[i] >> (8 * j + 4) & 15], scale[i]);
        values[2 * j + 1] = __fmul_rn(table[codes[i] >> (8 * j) & 15], scale[i]);
      }
      if (at < end) store_eight(out + at, values);
    }
  }
  for (int64 at = end + int64(blockIdx.x) * kThreads + threadIdx.x; at < n; at += int64(gridDim.x) * kThreads) {
    const int code = packed[at / 2] >> (at % 2 ? 0 : 4) & 15;
    out[at] = from_float<T>(__fmul_rn(table[code], scales[at >> blocksize_shift]));
  }
}

#define DEQUANTIZE_4BIT(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                                         \
      dequantize_4bit_##name(T* out, const uint8* packed, Scales scales, const float* codebook, int blocksize_shift, int64 n) { \
    dequantize(out, packed, scales, codebook, blocksize_shift, n);                                                          \
  }

DEQUANTIZE_4BIT(float32, float)
DEQUANTIZE_4BIT(float16, __half)
DEQUANTIZE_4BIT(bfloat16, __nv_bfloat16)

template <class T>
__device__ void quantize(uint8* packed, float* absmax, const T* x, const float* codebook, int blocksize_shift, int64 n) {
  __shared__ NearestCode4bit table;
  table.build(codebook);
  const bool aligned = reinterpret_cast<size_t>(packed) % 8 == 0;
  quantize_blocks(x, table, absmax, blocksize_shift, n, [=](int64 at, const uint32(&codes)[kPerThread]) {
    uint32 words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i / 4] |= (codes[2 * i] << 4 | codes[2 * i + 1]) << (i % 4 * 8);
    if (at + kPerThread <= n && aligned) {
      *reinterpret_cast<uint2*>(packed + at / 2) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (at + 2 * i < n) packed[at / 2 + i] = words[i / 4] >> (i % 4 * 8);
      }
    }
  });
}

#define QUANTIZE_4BIT(name, T)                                                                                          \
  extern "C" __global__ void __launch_bounds__(kQuantizeThreads, 3)                                                        \
      quantize_4bit_##name(uint8* packed, float* absmax, const T* x, const float* codebook, int blocksize_shift, int64 n) { \
    quantize(packed, absmax, x, codebook, blocksize_shift, n);                                                          \
  }

QUANTIZE_4BIT(float32, float)
QUANTIZE_4BIT(float16, __half)
QUANTIZE_4BIT(bfloat16, __nv_bfloat16)
