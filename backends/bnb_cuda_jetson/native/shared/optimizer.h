// What the host and the device code of optimizer steps have in common: the arguments of a step. Included by both compilers.
#pragma once

#ifdef __CUDACC__
#define BNB_SHARED __device__ inline
#else
#include <cmath>
#define BNB_SHARED inline
using std::exp;
using std::log;
using std::pow;
using std::sqrt;
#endif

// Kernels take as many tensors at a time as fit into the 4096 bytes of arguments that every driver takes.
constexpr int kTensorsAtOnce = 42;
constexpr int kStates = 3;

struct StepTensor {
  void* param;
  const void* grad;
  void* states[kStates];    // float32 values or uint8 codes; null where the algorithm has no such state
  float* absmax[kStates];   // of uint8 states
  long long n;              // elements; negative where an address is not aligned for loads of eight elements
  long long end;            // units of work of this tensor and those before it in the table
};

struct StepTensors {
  StepTensor tensors[kTensorsAtOnce];
  long long units;
};

// bnb_core.ops.spec.Hyperparameters, with step and learning rate.
struct Hyperparameters {
  double step, lr;
  double beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, momentum, dampening, lr_decay, weight_decay, gnorm_scale, max_unorm;
  int decoupled_weight_decay, skip_zeros, nesterov, bias_correction;
};

// What a step needs besides tensors: worked out in float64, and rounded once.
struct Scalars {
  float lr, decay, weight_decay, gnorm_scale, max_unorm;
  float beta1, new1, beta2, new2, beta3, new3;  // new = 1 - beta
  float numerator, alpha, eps;                  // Adam and AdEMAMix: u = (numerator m + alpha n) / (sqrt(v) + eps)
  float momentum, undamped;                     // undamped = 1 - dampening
  float slowdown;                               // Adagrad: 1 + (t - 1) lr_decay
  int first_step, skip_zeros, nesterov;
};

BNB_SHARED Scalars scalars_of(const Hyperparameters& h) {
  Scalars s;
  s.lr = float(h.lr);
  s.decay = float(h.decoupled_weight_decay ? 1.0 - h.lr * h.weight_decay : 1.0);
  s.weight_decay = float(h.decoupled_weight_decay ? 0.0 : h.weight_decay);
  s.gnorm_scale = float(h.gnorm_scale);
  s.max_unorm = float(h.max_unorm);
  double beta3 = h.beta3;
  if (h.t_beta3 > 0.0 && beta3 > 0.0) {
    // The formula of the spec, divided by ln beta1: this also has the limit for beta1 = 0.
    const double ratio = h.beta1 > 0.0 ? log(beta3) / log(h.beta1) : 0.0, done = h.step / h.t_beta3;
    const double scheduled = exp(log(beta3) / (ratio + done * (1.0 - ratio)));
    beta3 = scheduled < beta3 ? scheduled : beta3;
  }
  double alpha = h.alpha;
  if (h.t_alpha > 0.0 && h.step < h.t_alpha) alpha = h.step * h.alpha / h.t_alpha;
  // (m / c1 + alpha n) / (sqrt(v) / c2 + eps), numerator and denominator multiplied by c2.
  const double c1 = h.bias_correction ? 1.0 - pow(h.beta1, h.step) : 1.0;
  const double c2 = h.bias_correction ? sqrt(1.0 - pow(h.beta2, h.step)) : 1.0;
  s.numerator = float(c2 / c1);
  s.alpha = float(alpha * c2);
  s.eps = float(h.eps * c2);
  s.beta1 = float(h.beta1);
  s.new1 = float(1.0 - h.beta1);
  s.beta2 = float(h.beta2);
  s.new2 = float(1.0 - h.beta2);
  s.beta3 = float(beta3);
  s.new3 = float(1.0 - beta3);
  s.momentum = float(h.momentum);
  s.undamped = float(1.0 - h.dampening);
  s.slowdown = float(1.0 + (h.step - 1.0) * h.lr_decay);
  s.first_step = h.step == 1.0;
  s.skip_zeros = h.skip_zeros;
  s.nesterov = h.nesterov;
  return s;
}
