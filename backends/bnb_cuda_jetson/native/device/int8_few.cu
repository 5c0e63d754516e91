// int8_linear for one to four rows of x, at the speed at which memory gives the weight. Each block quantizes x for itself.
#include "int8_linear.cuh"
#include "overlap.cuh"

constexpr int kThreads = 512;
constexpr int kWeightRows = 2;  // that a warp multiplies at a time
constexpr int kAhead = 4;       // reads of 16 codes of each, on their way at a time

extern __shared__ uint4 shared[];

__device__ inline uint4 load_once(const int8* from) {
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

__device__ inline int dot_sixteen(const uint4& a, const uint4& b, int sum) {
  return dot_four(a.w, b.w, dot_four(a.z, b.z, dot_four(a.y, b.y, dot_four(a.x, b.x, sum))));
}

// List the columns in which a row of x reaches the threshold, in order: each warp those of a part of the columns.
template <int kRows, class T>
__device__ int list_outliers(uint16* list, const Int8Linear<T>& linear, float threshold) {
  __shared__ int counts[kThreads / 32];
  const int K = int(linear.K), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int each = (K / 16 + kThreads / 32 - 1) / (kThreads / 32) * 16, begin = min(warp * each, K), end = min(begin + each, K);
  const auto votes_at = [&](int k) {
    bool outlier = false;
    for (int row = 0; row < kRows && row < linear.rows; ++row) {
      outlier |= k + lane < end && fabsf(to_float(linear.x[row * linear.K + k + lane])) >= threshold;
    }
    return __ballot_sync(~0u, outlier);
  };
  int mine = 0;
  for (int k = begin; k < end; k += 32) mine += __popc(votes_at(k));
  if (lane == 0) counts[warp] = mine;
  __syncthreads();
  int at = 0, count = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    at += i < warp ? counts[i] : 0;
    count += counts[i];
  }
  for (int k = begin; mine && k < end; k += 32) {
    const uint32 votes = votes_at(k);
    if (votes >> lane & 1) list[at + __popc(votes & ((1u << lane) - 1))] = uint16(k + lane);
    at += __popc(votes);
  }
  return count;
}

// Shared memory: the codes of each row of x, then the list of outlier columns. K is a multiple of 16.
template <int kRows, class T>
__device__ void linear_few(const Int8Linear<T>& linear, float threshold) {
  const int K = int(linear.K), lane = threadIdx.x % 32;
  int8* const x_codes = reinterpret_cast<int8*>(shared);
  uint16* const outliers = reinterpret_cast<uint16*>(x_codes + kRows * K);
  const int64 pairs = (linear.N + kWeightRows - 1) / kWeightRows, stride = int64(gridDim.x) * (kThreads / 32);
  int64 pair = blockIdx.x + int64(gridDim.x) * (threadIdx.x / 32);
  const auto weight_row = [&](int i) { return linear.codes + min(pair * kWeightRows + i, linear.N - 1) * K; };

  // Ask the memory for the first weights: they are needed when x is quantized.
  if (pair < pairs) {
    for (int i = 0; i < kWeightRows; ++i) {
      for (int k = lane * 128; k < K; k += 32 * 128) prefetch(weight_row(i) + k);
    }
  }
  let_next_begin();
  wait_for_previous();
  const int outlier_count = threshold > 0.0f ? list_outliers<kRows>(outliers, linear, threshold) : 0;
  float row_scales[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    row_scales[row] = 0.0f;
    if (row >= linear.rows) break;
    const T* const x = linear.x + row * linear.K;
    uint32 largest = 0;
    for (int k = threadIdx.x; k < K; k += kThreads) largest = max(largest, magnitude_bits(below(to_float(x[k]), threshold)));
    const float absmax = __uint_as_float(block_maximum<kThreads>(largest)), scale = quantization_scale(absmax);
    row_scales[row] = absmax * (1.0f / (127.0f * 127.0f));
    for (int k = threadIdx.x; k < K; k += kThreads) x_codes[row * K + k] = quantize(below(to_float(x[k]), threshold), scale);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < outlier_count; at += kThreads) {
    for (int row = 0; row < kRows && row < linear.rows; ++row) x_codes[row * K + outliers[at]] = 0;
  }
  __syncthreads();

  for (; pair < pairs; pair += stride) {
    int sums[kWeightRows][kRows] = {};
    float outlier_sums[kWeightRows][kRows] = {};
    for (int at = lane; at < outlier_count; at += 32) {
      const int k = outliers[at];
      float weights[kWeightRows];
#pragma unroll
      for (int i = 0; i < kWeightRows; ++i) weights[i] = weight_row(i)[k];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= linear.rows) break;
        const float value = to_float(linear.x[row * linear.K + k]);
#pragma unroll
        for (int i = 0; i < kWeightRows; ++i) outlier_sums[i][row] = fmaf(value, weights[i], outlier_sums[i][row]);
      }
    }
    for (int start = lane * 16; start < K; start += kAhead * 512) {
      uint4 weights[kAhead][kWeightRows];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
#pragma unroll
        for (int i = 0; i < kWeightRows; ++i) {
          if (start + j * 512 < K) weights[j][i] = load_once(weight_row(i) + start + j * 512);
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int k = start + j * 512;
        if (k >= K) break;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const uint4 codes = *reinterpret_cast<const uint4*>(x_codes + row * K + k);
#pragma unroll
          for (int i = 0; i < kWeightRows; ++i) sums[i][row] = dot_sixteen(weights[j][i], codes, sums[i][row]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kWeightRows; ++i) {
      const int64 output = pair * kWeightRows + i;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        int sum = sums[i][row];
        float outlier_sum = outlier_sums[i][row];
#pragma unroll
        for (int offset = 16; offset; offset /= 2) {
          sum += __shfl_xor_sync(~0u, sum, offset);
          if (outlier_count) outlier_sum += __shfl_xor_sync(~0u, outlier_sum, offset);
        }
        if (lane == 0 && output < linear.N && row < linear.rows) {
          const float absmax = linear.absmax[output];
          linear.store(static_cast<float>(sum) * row_scales[row] * absmax + outlier_sum * (absmax * (1.0f / 127.0f)), row, output);
        }
      }
    }
  }
}

#define FEW(name, T)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) int8_linear_one_##name(Int8Linear<T> linear, float threshold) {      \
    linear_few<1>(linear, threshold);                                                                                            \
  }                                                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) int8_linear_four_##name(Int8Linear<T> linear, float threshold) {     \
    linear_few<4>(linear, threshold);                                                                                            \
  }

FEW(float32, float)
FEW(float16, __half)
FEW(bfloat16, __nv_bfloat16)
