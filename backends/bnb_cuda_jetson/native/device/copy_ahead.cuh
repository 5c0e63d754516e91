// Copies from global to shared memory that go on while the thread does. Before sm_80 they are ordinary ones, done at once.
#pragma once

#include "floats.cuh"

// 4, 8 or 16 bytes, to and from addresses that are multiples of the size. What is larger goes past the first-level cache.
template <int kSize>
__device__ inline void copy_ahead(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const uint32 address = uint32(__cvta_generic_to_shared(to));
  if (kSize == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kSize) : "memory");
  }
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
