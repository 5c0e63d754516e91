// What precedes some optimizer steps: scalars from a step or learning rate on the device, and the limit of a tensor's update.
#include "floats.cuh"
#include "optimizer.h"

// `step` and `lr` are given where they are on the device.
extern "C" __global__ void __launch_bounds__(32)
    step_scalars(Scalars* scalars, Hyperparameters hyperparameters, const float* step, const float* lr) {
  if (threadIdx.x) return;
  if (step) hyperparameters.step = *step;
  if (lr) hyperparameters.lr = *lr;
  *scalars = scalars_of(hyperparameters);
}

// By how much to scale a tensor's update, so that its norm is at most max_unorm times the parameter's. A block of threads a tensor.
// The order of the additions depends on sizes alone, so that results do not differ between runs.
extern "C" __global__ void __launch_bounds__(256)
    step_ratios(float* ratios, const StepTensors tensors, const double2* sums, float max_unorm) {
  __shared__ double2 partial[256];
  const int which = blockIdx.x;
  double2 sum = make_double2(0.0, 0.0);
  for (int64 unit = (which ? tensors.tensors[which - 1].end : 0) + threadIdx.x; unit < tensors.tensors[which].end; unit += 256) {
    sum.x += sums[unit].x;
    sum.y += sums[unit].y;
  }
  partial[threadIdx.x] = sum;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      partial[threadIdx.x].x += partial[threadIdx.x + half].x;
      partial[threadIdx.x].y += partial[threadIdx.x + half].y;
    }
  }
  if (threadIdx.x == 0) {
    const double limit = max_unorm * sqrt(partial[0].x), norm = sqrt(partial[0].y);
    ratios[which] = limit > 0.0 && norm > limit ? float(limit / norm) : 1.0f;
  }
}
