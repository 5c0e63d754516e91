// Products of small tiles on tensor cores (sm_80 and up). Lane l of a warp is (g, t) = (l / 4, l % 4).
#pragma once

#include "floats.cuh"

// sums[16 rows][8 columns] += a[16][16] b[16][8]. Lane (g, t) holds
//   a: rows g and g + 8 in a[0] and a[1] at columns 2t, 2t + 1; the same rows in a[2] and a[3] at columns 2t + 8, 2t + 9
//   b: column g, rows 2t, 2t + 1 in b0 and 2t + 8, 2t + 9 in b1
//   sums: row g, columns 2t, 2t + 1 in sums[0], sums[1]; row g + 8 in sums[2], sums[3]
// The 16 that are summed over may be taken in any order, if a and b agree on it.
template <class T>
__device__ inline void multiply_tile(float (&sums)[4], const uint32 (&a)[4], uint32 b0, uint32 b1);

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline void multiply_tile<__half>(float (&sums)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_tile<__nv_bfloat16>(float (&sums)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for int8: a[16][32] b[32][8], four codes where there are two numbers above; exact.
__device__ inline void multiply_tile(int (&sums)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif
