// optimizer_step_8bit_blockwise_: a kernel for each algorithm and dtype.
#include "optimizer.cuh"

constexpr int kThreads = 320;  // two blocks of threads have 96 registers each

#define STEP(algorithm, kAlgorithm, name, T)                                                                                   \
  extern "C" __global__ void __launch_bounds__(kThreads, states_of(kAlgorithm) < 3 ? 2 : 1)                                                            \
      step_8bit_##algorithm##_##name(const StepTensors tensors, const Scalars scalars, const Scalars* device_scalars,          \
                                     const float* ratios, double2* sums, const float* codebook1, const float* codebook2,       \
                                     const float* codebook3, int64 blocksize) {                                                \
    constexpr int count = states_of(kAlgorithm);                                                                               \
    __shared__ NearestCode8bit tables[count];                                                                                  \
    if (codebook1) tables[0].build(codebook1);                                                                                 \
    if (count > 1 && codebook2) tables[count > 1 ? 1 : 0].build(codebook2);                                                    \
    if (count > 2 && codebook3) tables[count > 2 ? 2 : 0].build(codebook3);                                                    \
    step<T, kAlgorithm, true>(tensors, scalars, device_scalars, ratios, sums, tables, blocksize);                   \
  }

#define STEPS(algorithm, kAlgorithm)            \
  STEP(algorithm, kAlgorithm, float32, float)   \
  STEP(algorithm, kAlgorithm, float16, __half)  \
  STEP(algorithm, kAlgorithm, bfloat16, __nv_bfloat16)

STEPS(adam, kAdam)
STEPS(amsgrad, kAmsgrad)
STEPS(ademamix, kAdemamix)
STEPS(lion, kLion)
STEPS(sgd, kSgd)
STEPS(rmsprop, kRmsprop)
STEPS(adagrad, kAdagrad)
