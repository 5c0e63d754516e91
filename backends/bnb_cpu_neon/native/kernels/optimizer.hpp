/// Entry points of the optimizer steps. What each computes is defined in bnb_core.ops.spec; tensors are dense, their elements in
/// the same order in storage, and not empty.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "elements.hpp"

namespace bnb {

/// The order is that of bnb_cpu_neon.optimizer.ALGORITHM_NUMBERS.
enum class Algorithm { adam, ademamix, lion, sgd, rmsprop, adagrad };

/// bnb_core.ops.spec.Hyperparameters, the step and the learning rate.
struct Hyperparameters {
    double beta1, beta2, beta3, alpha;
    int64_t t_alpha, t_beta3;
    double eps, momentum, dampening, lr_decay, weight_decay;
    bool decoupled_weight_decay;
    double gnorm_scale, max_unorm;
    bool skip_zeros, nesterov, centered, amsgrad, bias_correction;
    double step, lr;
};

constexpr std::size_t most_states = 3;

/// A parameter and what belongs to it; states that the algorithm does not have are null.
struct OptimizerTensor {
    void *param;
    const void *grad;
    std::array<void *, most_states> states;   ///< float, or uint8_t codes
    std::array<float *, most_states> absmax;  ///< [ceil(n / blocksize)] of each state of codes
    int64_t n;
};

/// Updates parameters and float32 states.
void optimizer_step_32bit(
    DType dtype, const std::vector<OptimizerTensor> &tensors, Algorithm algorithm, const Hyperparameters &hyperparameters, int threads);

/// Updates parameters and states of 8-bit codes, each state with a codebook of 256 entries.
void optimizer_step_8bit_blockwise(
    DType dtype, const std::vector<OptimizerTensor> &tensors, const std::array<const float *, most_states> &codebooks,
    Algorithm algorithm, const Hyperparameters &hyperparameters, int64_t blocksize, int threads);

}  // namespace bnb
