// 4-bit quantization: quantize_4bit and dequantize_4bit.
#include "floats.cuh"
#include "scales.cuh"

constexpr int kElementsPerThread = 8;  // four bytes of codes
constexpr int kTilesAtOnce = 4;        // loads in flight of each thread

template <class T>
__device__ void dequantize(T* out, const uint8* packed, const Scales& scales, const float* codebook, int blocksize_shift, int64 n) {
  // Sixteen words lie in sixteen banks of shared memory: whatever the codes, a warp looks them up in one go.
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  const int64 tile = int64(blockDim.x) * kElementsPerThread;
  const bool aligned = reinterpret_cast<size_t>(packed) % 4 == 0 && reinterpret_cast<size_t>(out) % 16 == 0;
  for (int64 start = blockIdx.x * tile * kTilesAtOnce; start < n; start += gridDim.x * tile * kTilesAtOnce) {
    uint32 codes[kTilesAtOnce];
    float scale[kTilesAtOnce];
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int64 at = start + i * tile + threadIdx.x * kElementsPerThread;
      codes[i] = 0;
      if (at + kElementsPerThread <= n && aligned) {
        codes[i] = *reinterpret_cast<const uint32*>(packed + at / 2);
      } else {
        for (int j = 0; j < 4; ++j) {
          if (at + 2 * j < n) codes[i] |= uint32(packed[at / 2 + j]) << (8 * j);
        }
      }
      scale[i] = at < n ? scales[at >> blocksize_shift] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int64 at = start + i * tile + threadIdx.x * kElementsPerThread;
      float values[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[2 * j] = __fmul_rn(table[codes[i] >> (8 * j + 4) & 15], scale[i]);
        values[2 * j + 1] = __fmul_rn(table[codes[i] >> (8 * j) & 15], scale[i]);
      }
      if (at + kElementsPerThread <= n && aligned) {
        store_eight(out + at, values);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (at + j < n) out[at + j] = from_float<T>(values[j]);
        }
      }
    }
  }
}

#define DEQUANTIZE_4BIT(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                         \
      dequantize_4bit_##name(T* out, const uint8* packed, Scales scales, const float* codebook, int blocksize_shift, int64 n) { \
    dequantize(out, packed, scales, codebook, blocksize_shift, n);                                                          \
  }

DEQUANTIZE_4BIT(float32, float)
DEQUANTIZE_4BIT(float16, __half)
DEQUANTIZE_4BIT(bfloat16, __nv_bfloat16)
