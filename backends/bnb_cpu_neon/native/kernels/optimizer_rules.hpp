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

/// An update rule for n elements: param = param * decay - factor * direction. The states are updated in place.
struct UpdateRule {
    /// For n that is a multiple of 8.
    void (*apply)(
        const Coefficients &coefficients, float decay, float factor, float *param, const float *grad, float *const *states, int64_t n);
    /// For states that are to be multiplied by a scale each; fills `absmax` with their largest magnitudes after the step, or NaN. n is
    /// a multiple of 16.
    void (*apply_scaled)(
        const Coefficients &coefficients, float decay, float factor, float *param, const float *grad, float *const *states,
        const float *scales, float *absmax, int64_t n);
};

UpdateRule update_rule(Algorithm algorithm, const Hyperparameters &h);

}  // namespace bnb
