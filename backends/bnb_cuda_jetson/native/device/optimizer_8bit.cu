// optimizer_step_8bit_blockwise_: a kernel for each algorithm and dtype.
#include "optimizer.cuh"

constexpr int kThreads = 256;

// Blocks of threads that a multiprocessor is to hold, as many as registers suffice for: four leave 64 to a thread, three 80, two 128.
template <class T>
__host__ __device__ constexpr int blocks_of(int algorithm) {
#if __CUDA_ARCH__ >= 800
  if (states_of(algorithm) == 3) return algorithm == kAdemamix ? 3 : 2;
  return sizeof(T) == 2 ? 4 : 3;  // float32 elements keep memory busy with fewer threads
#else
  return states_of(algorithm) < 3 ? 3 : 2;
#endif
}

#define STEP(algorithm, kAlgorithm, name, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads, blocks_of<T>(kAlgorithm))                                       \
      step_8bit_##algorithm##_##name(const StepTensors tensors, const Scalars scalars, const Scalars* device_scalars,    \
                                     const float* ratios, double2* sums, const float* codebook1, const float* codebook2, \
                                     const float* codebook3, int64 blocksize) {                                          \
    constexpr int count = states_of(kAlgorithm);                                                                         \
    __shared__ Codebook::Table tables[count];                                                                            \
    Codebook codebooks[count];                                                                                           \
    const float* const given[3] = {codebook1, codebook2, codebook3};                                                     \
    for (int k = 0; k < count; ++k) {                                                                                    \
      if (given[k]) codebooks[k] = Codebook(tables[k], given[k]);                                                        \
    }                                                                                                                    \
    step<T, kAlgorithm, true, kThreads / 32>(tensors, scalars, device_scalars, ratios, sums, codebooks, blocksize);      \
  }

#define STEPS(algorithm, kAlgorithm)           \
  STEP(algorithm, kAlgorithm, float32, float)  \
  STEP(algorithm, kAlgorithm, float16, __half) \
  STEP(algorithm, kAlgorithm, bfloat16, __nv_bfloat16)

STEPS(adam, kAdam)
STEPS(amsgrad, kAmsgrad)
STEPS(ademamix, kAdemamix)
STEPS(lion, kLion)
STEPS(sgd, kSgd)
STEPS(rmsprop, kRmsprop)
STEPS(adagrad, kAdagrad)
