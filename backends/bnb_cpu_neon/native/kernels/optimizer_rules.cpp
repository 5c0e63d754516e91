/// The update rules of optimizers, each from the gradient and the states to the states after the step and the direction.
#include "kernels/optimizer_rules.hpp"

#include <algorithm>
#include <cmath>

namespace bnb {
namespace {

using Vector = float32x4_t;

/// An exponential moving average.
struct Average {
    float old_weight, new_weight;
    Vector operator()(Vector average, Vector value) const {
        return vfmaq_n_f32(vmulq_n_f32(average, old_weight), value, new_weight);
    }
};

struct Adam {
    static constexpr bool uses[most_states] = {true, true, false};
    const Coefficients &c;

    static bool absorb(Coefficients &c, const float *scales) {
        c.beta1 *= scales[0];
        c.beta2 *= scales[1];
        return true;
    }

    Vector operator()(Vector g, Vector *s) const {
        s[0] = Average{c.beta1, c.new1}(s[0], g);
        s[1] = vfmaq_f32(vmulq_n_f32(s[1], c.beta2), vmulq_n_f32(g, c.new2), g);
        return divide(s[0], denominator(s[1]));
    }
    Vector denominator(Vector v) const { return vfmaq_n_f32(vdupq_n_f32(c.eps), square_root(v), c.inverse_c2); }
};

struct AmsgradAdam {
    static constexpr bool uses[most_states] = {true, true, true};
    const Coefficients &c;

    Vector operator()(Vector g, Vector *s) const {
        const Adam adam{c};
        adam(g, s);
        s[2] = vmaxq_f32(s[2], s[1]);
        return divide(s[0], adam.denominator(s[2]));
    }
};

struct AdEMAMix {
    static constexpr bool uses[most_states] = {true, true, true};
    const Coefficients &c;

    Vector operator()(Vector g, Vector *s) const {
        const Adam adam{c};
        adam(g, s);
        s[2] = Average{c.beta3, c.new3}(s[2], g);
        return divide(vfmaq_n_f32(vmulq_n_f32(s[0], c.inverse_c1), s[2], c.alpha), adam.denominator(s[1]));
    }
};

struct Lion {
    static constexpr bool uses[most_states] = {true, false, false};
    const Coefficients &c;

    static bool absorb(Coefficients &c, const float *scales) {
        c.beta1 *= scales[0];
        c.beta2 *= scales[0];
        return true;
    }

    Vector operator()(Vector g, Vector *s) const {
        const Vector mixed = Average{c.beta1, c.new1}(s[0], g);
        s[0] = Average{c.beta2, c.new2}(s[0], g);
        // The sign times 2^31. As integers, float32 numbers have the same sign, but for -0; shifted far enough, all others saturate.
        const int32x4_t bits = vreinterpretq_s32_f32(vaddq_f32(mixed, vdupq_n_f32(0.0f)));
        return vcvtq_f32_s32(vqshlq_s32(bits, vdupq_n_s32(31)));
    }
};

struct Sgd {
    static constexpr bool uses[most_states] = {false, false, false};
    const Coefficients &c;

    Vector operator()(Vector g, Vector *) const { return g; }
};

struct MomentumSgd {
    static constexpr bool uses[most_states] = {true, false, false};
    const Coefficients &c;

    static bool absorb(Coefficients &c, const float *scales) {
        c.momentum *= scales[0];
        return true;
    }

    Vector operator()(Vector g, Vector *s) const {
        s[0] = c.first_step ? g : Average{c.momentum, c.undampened}(s[0], g);
        return vfmaq_n_f32(vmulq_n_f32(s[0], c.of_momentum), g, c.of_gradient);
    }
};

template <bool centered, bool with_momentum>
struct RmsProp {
    static constexpr bool uses[most_states] = {true, with_momentum, centered};
    const Coefficients &c;

    Vector operator()(Vector g, Vector *s) const {
        const Vector fresh = vmulq_n_f32(g, c.new2);
        s[0] = vfmaq_f32(vmulq_n_f32(s[0], c.beta2), fresh, g);
        Vector variance = s[0];
        if (centered) {
            s[2] = vfmaq_n_f32(fresh, s[2], c.beta2);
            variance = vmaxq_f32(vfmaq_f32(variance, vnegq_f32(s[2]), s[2]), vdupq_n_f32(0.0f));
        }
        const Vector direction = divide(g, vaddq_f32(square_root(variance), vdupq_n_f32(c.eps)));
        if (!with_momentum) return direction;
        s[1] = vfmaq_n_f32(direction, s[1], c.momentum);
        return s[1];
    }
};

struct Adagrad {
    static constexpr bool uses[most_states] = {true, false, false};
    const Coefficients &c;

    Vector operator()(Vector g, Vector *s) const {
        s[0] = vfmaq_f32(s[0], g, g);
        return divide(g, vaddq_f32(square_root(s[0]), vdupq_n_f32(c.eps)));
    }
};

/// Multiplies the weights of old states by their scales, if the rule takes these only multiplied by a weight.
template <class Rule>
auto absorb(Coefficients &c, const float *scales, int) -> decltype(Rule::absorb(c, scales)) {
    return Rule::absorb(c, scales);
}
template <class Rule>
bool absorb(Coefficients &, const float *, long) {
    return false;
}

/// Applies a rule to some vectors of elements at a time. `load(state, i)` gives four values of a state, `store(state, i, values)` takes
/// those after the step.
template <class Rule, int vectors, bool decays, class Load, class Store>
BNB_INLINE inline void update(
    const Coefficients &coefficients, float decay, float factor, float *param, const float *grad, const Load &load, const Store &store,
    int64_t n) {
    const Rule rule{coefficients};
    for (int64_t i = 0; i < n; i += 4 * vectors) {
        Vector p[vectors], g[vectors], s[vectors][most_states];
        for (int v = 0; v < vectors; ++v) g[v] = vld1q_f32(grad + i + 4 * v);
        for (std::size_t state = 0; state < most_states; ++state)
            for (int v = 0; Rule::uses[state] && v < vectors; ++v) s[v][state] = load(state, i + 4 * v);
        for (int v = 0; v < vectors; ++v) p[v] = vld1q_f32(param + i + 4 * v);
        for (int v = 0; v < vectors; ++v) p[v] = vfmaq_n_f32(decays ? vmulq_n_f32(p[v], decay) : p[v], rule(g[v], s[v]), -factor);
        for (int v = 0; v < vectors; ++v) vst1q_f32(param + i + 4 * v, p[v]);
        for (std::size_t state = 0; state < most_states; ++state)
            for (int v = 0; Rule::uses[state] && v < vectors; ++v) store(state, i + 4 * v, s[v][state]);
    }
}

// What is passed by pointer is copied first: the compiler then knows it to be apart from what is written.

template <class Rule>
void apply(
    const Coefficients &coefficients, float decay, float factor, float *param, const float *grad, float *const *states, int64_t n) {
    const Coefficients local = coefficients;
    float *const values[most_states] = {states[0], states[1], states[2]};
    const auto load = [&](std::size_t state, int64_t i) { return vld1q_f32(values[state] + i); };
    const auto store = [&](std::size_t state, int64_t i, Vector after) { vst1q_f32(values[state] + i, after); };
    update<Rule, 2, true>(local, decay, factor, param, grad, load, store, n);
}

template <class Rule>
void apply_scaled(
    const Coefficients &coefficients, float decay, float factor, float *param, const float *grad, float *const *states,
    const float *scales, float *absmax, int64_t n) {
    Coefficients local = coefficients;
    const bool absorbed = absorb<Rule>(local, scales, 0);
    float *const values[most_states] = {states[0], states[1], states[2]};
    const float scale[most_states] = {scales[0], scales[1], scales[2]};
    // Magnitudes compare as their bits do, and NaN is above all.
    uint32x4_t largest[most_states] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
    const auto load = [&](std::size_t state, int64_t i) {
        const Vector stored = vld1q_f32(values[state] + i);
        return absorbed ? stored : vmulq_n_f32(stored, scale[state]);
    };
    const auto store = [&](std::size_t state, int64_t i, Vector after) {
        largest[state] = vmaxq_u32(largest[state], vreinterpretq_u32_f32(vabsq_f32(after)));
        vst1q_f32(values[state] + i, after);
    };
    if (decay == 1) {
        update<Rule, 4, false>(local, decay, factor, param, grad, load, store, n);
    } else {
        update<Rule, 4, true>(local, decay, factor, param, grad, load, store, n);
    }
    for (std::size_t state = 0; state < most_states; ++state) {
        absmax[state] = vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(vmaxvq_u32(largest[state]))), 0);
    }
}

template <class Rule>
constexpr UpdateRule rule_of = {apply<Rule>, apply_scaled<Rule>};

/// AdEMAMix: alpha grows linearly, the slow average's beta from beta1 to beta3 (arXiv 2409.03137).
double scheduled_alpha(const Hyperparameters &h) {
    return h.t_alpha ? std::min(h.step * h.alpha / static_cast<double>(h.t_alpha), h.alpha) : h.alpha;
}

double scheduled_beta3(const Hyperparameters &h) {
    if (!h.t_beta3 || h.beta3 == 0) return h.beta3;
    // The formula of the spec, divided by ln beta1: this also has the limit for beta1 = 0.
    const double ratio = h.beta1 != 0 ? std::log(h.beta3) / std::log(h.beta1) : 0;
    const double done = h.step / static_cast<double>(h.t_beta3);
    return std::min(std::exp(std::log(h.beta3) / (ratio + done * (1 - ratio))), h.beta3);
}

}  // namespace

Coefficients::Coefficients(Algorithm algorithm, const Hyperparameters &h) {
    const double c1 = h.bias_correction ? 1 - std::pow(h.beta1, h.step) : 1;
    const double c2 = h.bias_correction ? std::sqrt(1 - std::pow(h.beta2, h.step)) : 1;
    const double slow = scheduled_beta3(h);
    const auto rounded = [](double value) { return static_cast<float>(value); };
    beta1 = rounded(h.beta1);
    new1 = rounded(1 - h.beta1);
    beta2 = rounded(h.beta2);
    new2 = rounded(1 - h.beta2);
    beta3 = rounded(slow);
    new3 = rounded(1 - slow);
    eps = rounded(h.eps);
    inverse_c1 = rounded(1 / c1);
    inverse_c2 = rounded(1 / c2);
    alpha = rounded(scheduled_alpha(h));
    momentum = rounded(h.momentum);
    undampened = rounded(1 - h.dampening);
    of_gradient = h.nesterov ? 1.0f : 0.0f;
    of_momentum = h.nesterov ? momentum : 1.0f;
    first_step = h.step == 1;
    rate = 1;
    if (algorithm == Algorithm::adam) rate = 1 / c1;
    if (algorithm == Algorithm::lion) rate = 0x1p-31;
    if (algorithm == Algorithm::adagrad) rate = 1 / (1 + (h.step - 1) * h.lr_decay);
}

UpdateRule update_rule(Algorithm algorithm, const Hyperparameters &h) {
    switch (algorithm) {
        case Algorithm::adam:
            return h.amsgrad ? rule_of<AmsgradAdam> : rule_of<Adam>;
        case Algorithm::ademamix:
            return rule_of<AdEMAMix>;
        case Algorithm::lion:
            return rule_of<Lion>;
        case Algorithm::sgd:
            return h.momentum != 0 ? rule_of<MomentumSgd> : rule_of<Sgd>;
        case Algorithm::rmsprop:
            if (h.centered) return h.momentum != 0 ? rule_of<RmsProp<true, true>> : rule_of<RmsProp<true, false>>;
            return h.momentum != 0 ? rule_of<RmsProp<false, true>> : rule_of<RmsProp<false, false>>;
        default:
            return rule_of<Adagrad>;
    }
}

}  // namespace bnb
