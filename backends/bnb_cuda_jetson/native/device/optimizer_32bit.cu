// optimizer_step_32bit_: a kernel for each algorithm and dtype.
#include "optimizer.cuh"

constexpr int kThreads = 256;  // two blocks of threads have 128 registers each

#define STEP(algorithm, kAlgorithm, name, T)                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads, states_of(kAlgorithm) < 3 ? 2 : 1)                            \
      step_32bit_##algorithm##_##name(const StepTensors tensors, const Scalars scalars, const Scalars* device_scalars, \
                                      const float* ratios, double2* sums) {                                            \
    step<T, kAlgorithm, false, kThreads / 32>(tensors, scalars, device_scalars, ratios, sums, nullptr, kPiece);        \
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
