// Copies from global to shared memory that go on while the thread does. Before sm_80 they are ordinary ones, done at once.
#pragma once

#include "floats.cuh"

__device__ inline uint32 shared_address(const void* pointer) { return uint32(__cvta_generic_to_shared(pointer)); }

// A value that is worked out once and kept. Left to itself the compiler works out addresses of shared memory again where each is used,
// which takes longer than the access.
__device__ inline uint32 keep(uint32 value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ inline int keep(int value) { return int(keep(uint32(value))); }
__device__ inline int64 keep(int64 value) {
  asm volatile("" : "+l"(value));
  return value;
}

// What is at an address of shared memory.
template <class T>
__device__ inline T load_shared(uint32 from);
template <>
__device__ inline uint32 load_shared<uint32>(uint32 from) {
  uint32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from));
  return value;
}
template <>
__device__ inline float load_shared<float>(uint32 from) { return __uint_as_float(load_shared<uint32>(from)); }
template <>
__device__ inline uint2 load_shared<uint2>(uint32 from) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(from));
  return value;
}
template <>
__device__ inline uint4 load_shared<uint4>(uint32 from) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(from));
  return value;
}

__device__ inline void store_shared(uint32 to, float value) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory"); }

// Load, or give zeros. Written out, so that it is issued where it stands: before a wait that follows, not after it.
__device__ inline uint4 load_if(bool condition, const void* from) {
  uint4 value = make_uint4(0, 0, 0, 0);
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
               : "l"(from), "r"(uint32(condition)));
  return value;
}

#if __CUDA_ARCH__ >= 800
// 4, 8 or 16 bytes, to and from addresses that are multiples of the size. What is larger goes past the first-level cache.
template <int kSize>
__device__ inline void copy_ahead(uint32 to, const void* from) {
  if (kSize == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kSize) : "memory");
  }
}
#endif

template <int kSize>
__device__ inline void copy_ahead(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  copy_ahead<kSize>(shared_address(to), from);
#else
  if (kSize == 16) {
    *static_cast<uint4*>(to) = __ldg(static_cast<const uint4*>(from));
  } else {
    for (int i = 0; i < kSize / 4; ++i) static_cast<uint32*>(to)[i] = __ldg(static_cast<const uint32*>(from) + i);
  }
#endif
}

// End a group of copies.
__device__ inline void end_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until no more than the last kGroups groups of this thread's copies are under way.
template <int kGroups>
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}
