// Kernels that begin while the one before them in the stream is still at work, where the driver is told so (sm_90 and up). What they do
// before `wait_for_previous` may only ask for memory to be brought near: nothing is read that another kernel may have written.
#pragma once

#include "floats.cuh"

// Let the next kernel begin as soon as there is room.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Wait until the kernels before have ended, and what they wrote can be read.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Bring 128 bytes into the second-level cache.
__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
