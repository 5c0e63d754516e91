/// The update rules of optimizers.
#pragma once

#include "kernels/optimizer.hpp"

namespace bnb {

/// What depends on hyperparameters, step and learning rate alone: worked out in float64 and rounded once.
struct Coefficients {
    float beta1, new1, beta2, new2, beta3, new3;  ///< of the old value and of the new one in each moving average
    float eps, inverse_c1, inverse_c2, alpha, momentum, undampened, of_gradient, of_momentum;
    bool first_step;
    double rate;  ///< what the rule's direction is multiplied by besides the learning rate

    Coefficients(Algorithm algorithm, const Hyperparameters &h);
};

/// Updates n elements, a multiple of 8, and their states: param = param * decay - factor * direction.
using UpdateRule =
    void(const Coefficients &coefficients, float decay, float factor, float *param, const float *grad, float *const *states, int64_t n);

UpdateRule *update_rule(Algorithm algorithm, const Hyperparameters &h);

}  // namespace bnb
