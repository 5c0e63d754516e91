/// The optimizer steps: read a chunk of a parameter and its states, apply the rule, write it back.
#include "kernels/optimizer.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "kernels/block256.hpp"
#include "kernels/mirrored.hpp"
#include "kernels/optimizer_rules.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements that are worked on at a time, in float32. Rules take them by eights.
constexpr int64_t chunk_size = 256;
/// Elements of a tensor, about, that make a group. A thread has one at least. Norms are added up group by group, so that they do
/// not depend on the number of threads.
constexpr int64_t group_size = 1 << 14;

// ----------------------------------------------------------------------------------------------------------- elements in memory

template <class T>
void read(const T *from, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) unroll<4>([&](auto v) BNB_INLINE { vst1q_f32(to + i + 4 * v, load4(from + i + 4 * v)); });
    for (; i < n; ++i) to[i] = load1(from + i);
}

template <class T>
void write(const float *from, int64_t n, T *to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) unroll<4>([&](auto v) BNB_INLINE { store4(to + i + 4 * v, vld1q_f32(from + i + 4 * v)); });
    for (; i < n; ++i) store1(to + i, from[i]);
}

/// Whether no value is NaN or infinite. A sum of products of any two of them finds those that are, and seldom some that are only
/// huge. n is a multiple of 8.
bool all_finite(const float *values, int64_t n) {
    float32x4_t sums[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        for (int v = 0; v < 8; ++v) sums[v % 4] = vfmaq_f32(sums[v % 4], vld1q_f32(values + i + 8 * v), vld1q_f32(values + i + 8 * v + 4));
    }
    for (; i < n; i += 8) sums[0] = vfmaq_f32(sums[0], vld1q_f32(values + i), vld1q_f32(values + i + 4));
    return std::isfinite(vaddvq_f32(vaddq_f32(vaddq_f32(sums[0], sums[1]), vaddq_f32(sums[2], sums[3]))));
}

double sum_of_squares(const float *values, int64_t n) {
    double sums[4] = {};
    for (int64_t i = 0; i < n; ++i) sums[i % 4] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/// float32 states.
class States32bit {
  public:
    static constexpr bool in_place = true;

    int64_t blocksize() const { return chunk_size; }
    /// Reads n values of a block; they are to be multiplied by what is returned.
    float load(const OptimizerTensor &tensor, std::size_t state, int64_t, int64_t first, int64_t n, float *values) const {
        std::copy_n(static_cast<const float *>(tensor.states[state]) + first, n, values);
        return 1.0f;
    }
    void store(const OptimizerTensor &tensor, std::size_t state, int64_t first, int64_t n, const float *values, float) const {
        std::copy_n(values, n, static_cast<float *>(tensor.states[state]) + first);
    }
};

/// States of 8-bit codes with one scale a block.
class States8bit {
  public:
    static constexpr bool in_place = false;

    States8bit(const std::array<const float *, most_states> &codebooks, int64_t blocksize) : blocksize_(blocksize) {
        for (std::size_t state = 0; state < most_states; ++state) {
            if (!codebooks[state]) continue;
            codebooks_[state] = Codebook256::of(codebooks[state]);
            mirrored_[state] = MirroredCodebook::of(codebooks_[state]->entries());
        }
    }

    int64_t blocksize() const { return blocksize_; }
    float load(const OptimizerTensor &tensor, std::size_t state, int64_t block, int64_t first, int64_t n, float *values) const {
        const MirroredCodebook *const mirrored = mirrored_[state] ? &*mirrored_[state] : nullptr;
        copy_entries(mirrored, static_cast<const uint8_t *>(tensor.states[state]) + first, codebooks_[state]->entries(), n, values);
        return tensor.absmax[state][block];
    }
    void store(const OptimizerTensor &tensor, std::size_t state, int64_t first, int64_t n, const float *values, float absmax) const {
        encode_block(*codebooks_[state], values, n, absmax, static_cast<uint8_t *>(tensor.states[state]) + first);
    }

  private:
    std::array<std::shared_ptr<const Codebook256>, most_states> codebooks_;
    std::array<std::optional<MirroredCodebook>, most_states> mirrored_;
    int64_t blocksize_;
};

// ----------------------------------------------------------------------------------------------------------------------- a step

/// A chunk of a tensor in float32: where it lies in memory if that may be, and copied otherwise. Filled up with zeros to `padded`.
struct Chunk {
    int64_t n, padded;
    float *param;
    const float *grad;
    float *states[most_states];      ///< null if there is none
    float scales[most_states];       ///< of the states, until the rule is applied
    float absmax[most_states] = {};  ///< of the states, after the rule
    bool some_left_alone;            ///< the step does not change every element
    bool left_alone[chunk_size];
    float copies[2 + most_states][chunk_size];

    float *copy(std::size_t which) {
        for (int64_t i = n; i < padded; ++i) copies[which][i] = 0.0f;
        return copies[which];
    }
};

/// Squares of the L2 norms of a parameter and of its direction.
struct Norms {
    double param = 0, direction = 0;
};

/// A step of tensors whose parameters are of type T.
template <class T, class States>
class Step {
  public:
    Step(const States &states, Algorithm algorithm, const Hyperparameters &h)
        : states_(states),
          h_(h),
          coefficients_(algorithm, h),
          rule_(update_rule(algorithm, h)),
          coupled_decay_(h.weight_decay != 0 && !h.decoupled_weight_decay) {}

    /// Works out the norms of blocks of a tensor, changing nothing.
    Norms norms(const OptimizerTensor &tensor, int64_t begin, int64_t end) const {
        Norms norms;
        Chunk chunk;
        for (int64_t block = begin; block < end; ++block) {
            for_chunks(tensor, block, [&](int64_t first, int64_t n) {
                load(tensor, block, first, n, true, chunk);
                norms.param += sum_of_squares(chunk.param, n);
                // Without decay and from zero on, minus the direction is what becomes of a parameter.
                std::fill_n(chunk.param, chunk.padded, 0.0f);
                apply(1.0f, coefficients_.rate, chunk);
                norms.direction += sum_of_squares(chunk.param, n);
            });
        }
        return norms;
    }

    /// What the direction is multiplied by where max_unorm does not allow all of it.
    double trust_ratio(const Norms &norms) const {
        const double limit = h_.max_unorm * std::sqrt(norms.param), length = std::sqrt(norms.direction);
        return norms.param > 0 && length > limit ? limit / length : 1;
    }

    /// Updates blocks of a tensor.
    void update(const OptimizerTensor &tensor, int64_t begin, int64_t end, double trust_ratio) const {
        const float decay = h_.decoupled_weight_decay ? static_cast<float>(1 - h_.lr * h_.weight_decay) : 1.0f;
        const double factor = h_.lr * trust_ratio * coefficients_.rate;
        const bool single = states_.blocksize() <= chunk_size;
        Chunk chunk;
        for (int64_t block = begin; block < end; ++block) {
            // Of a block that is a single chunk, absmax is known in time; else a first run over the block finds it.
            float of_chunks[most_states] = {};
            if (!single) find_absmax(tensor, block, decay, factor, chunk, of_chunks);
            const float *absmax = single ? chunk.absmax : of_chunks;
            for_chunks(tensor, block, [&](int64_t first, int64_t n) {
                load(tensor, block, first, n, false, chunk);
                apply(decay, factor, chunk);
                store(tensor, first, absmax, chunk);
            });
            for (std::size_t state = 0; !States::in_place && state < most_states; ++state) {
                if (tensor.absmax[state]) tensor.absmax[state][block] = absmax[state];
            }
        }
    }

  private:
    template <class Body>
    void for_chunks(const OptimizerTensor &tensor, int64_t block, const Body &body) const {
        const int64_t end = std::min(tensor.n, (block + 1) * states_.blocksize());
        for (int64_t first = block * states_.blocksize(); first < end; first += chunk_size) body(first, std::min(chunk_size, end - first));
    }

    /// Works out the largest magnitudes that a block's states will have, changing nothing.
    __attribute__((noinline)) void find_absmax(
        const OptimizerTensor &tensor, int64_t block, float decay, double factor, Chunk &chunk, float *absmax) const {
        for_chunks(tensor, block, [&](int64_t first, int64_t n) {
            load(tensor, block, first, n, true, chunk);
            apply(decay, factor, chunk);
            for (std::size_t state = 0; state < most_states; ++state) {
                if (!(chunk.absmax[state] <= absmax[state])) absmax[state] = chunk.absmax[state];  // a NaN stays
            }
        });
    }

    /// Reads a chunk and prepares its gradient. With `copy`, nothing in the chunk is the tensor's own memory.
    void load(const OptimizerTensor &tensor, int64_t block, int64_t first, int64_t n, bool copy, Chunk &chunk) const {
        chunk.n = n;
        chunk.padded = (n + 7) & ~int64_t{7};
        const bool whole = n == chunk.padded;
        chunk.param = pointer_to(static_cast<T *>(tensor.param) + first, whole && !copy, chunk, 0);
        chunk.grad = pointer_to(const_cast<T *>(static_cast<const T *>(tensor.grad)) + first, whole, chunk, 1);
        for (std::size_t state = 0; state < most_states; ++state) {
            chunk.states[state] = nullptr;
            if (!tensor.states[state]) continue;
            if (States::in_place && whole && !copy) {
                chunk.states[state] = static_cast<float *>(tensor.states[state]) + first;
            } else {
                chunk.states[state] = chunk.copy(2 + state);
                chunk.scales[state] = states_.load(tensor, state, block, first, n, chunk.states[state]);
            }
        }
        prepare_gradient(chunk);
    }

    /// float32 elements where they are, if `in_place`; else a copy.
    static float *pointer_to(T *elements, bool in_place, Chunk &chunk, std::size_t which) {
        if constexpr (std::is_same_v<T, float>) {
            if (in_place) return elements;
        }
        float *copy = chunk.copy(which);
        read(elements, chunk.n, copy);
        return copy;
    }

    BNB_INLINE void prepare_gradient(Chunk &chunk) const {
        chunk.some_left_alone = h_.skip_zeros || !all_finite(chunk.grad, chunk.padded);
        if (chunk.some_left_alone || coupled_decay_ || h_.gnorm_scale != 1) change_gradient(chunk);
    }

    /// Scales the gradient, adds the decay that is coupled to it, and finds out which elements are to be left alone.
    __attribute__((noinline)) void change_gradient(Chunk &chunk) const {
        const float scale = static_cast<float>(h_.gnorm_scale), decay = coupled_decay_ ? static_cast<float>(h_.weight_decay) : 0.0f;
        float *prepared = chunk.copies[1];
        for (int64_t i = 0; i < chunk.padded; ++i) {
            const float g = chunk.grad[i];
            chunk.left_alone[i] = !std::isfinite(g) || (h_.skip_zeros && g == 0);
            prepared[i] = chunk.left_alone[i] ? 0.0f : coupled_decay_ ? g * scale + decay * chunk.param[i] : g * scale;
        }
        chunk.grad = prepared;
    }

    /// Applies the rule to a chunk.
    BNB_INLINE void apply(float decay, double factor, Chunk &chunk) const {
        const float rounded = static_cast<float>(factor);
        if (!States::in_place && !chunk.some_left_alone && chunk.n % 16 == 0) {
            rule_.apply_scaled(
                coefficients_, decay, rounded, chunk.param, chunk.grad, chunk.states, chunk.scales, chunk.absmax, chunk.n);
        } else {
            apply_and_restore(decay, rounded, chunk);
        }
    }

    /// The same for chunks of any length, and puts back what is to be left alone.
    __attribute__((noinline)) void apply_and_restore(float decay, float factor, Chunk &chunk) const {
        float *const changed[] = {chunk.param, chunk.states[0], chunk.states[1], chunk.states[2]};
        float before[1 + most_states][chunk_size];
        for (std::size_t i = 0; i <= most_states; ++i) {
            if (!States::in_place && i > 0 && changed[i]) {
                for (int64_t at = 0; at < chunk.n; ++at) changed[i][at] *= chunk.scales[i - 1];
            }
            if (chunk.some_left_alone && changed[i]) std::copy_n(changed[i], chunk.n, before[i]);
        }
        rule_.apply(coefficients_, decay, factor, chunk.param, chunk.grad, chunk.states, chunk.padded);
        for (std::size_t i = 0; i <= most_states; ++i) {
            for (int64_t at = 0; chunk.some_left_alone && changed[i] && at < chunk.n; ++at) {
                if (chunk.left_alone[at]) changed[i][at] = before[i][at];
            }
            if (!States::in_place && i > 0 && changed[i]) chunk.absmax[i - 1] = largest_magnitude(changed[i], chunk.n);
        }
    }

    void store(const OptimizerTensor &tensor, int64_t first, const float *absmax, const Chunk &chunk) const {
        if (chunk.param == chunk.copies[0]) write(chunk.param, chunk.n, static_cast<T *>(tensor.param) + first);
        for (std::size_t state = 0; state < most_states; ++state) {
            if (chunk.states[state] != chunk.copies[2 + state]) continue;
            states_.store(tensor, state, first, chunk.n, chunk.states[state], absmax[state]);
        }
    }

    const States &states_;
    const Hyperparameters &h_;
    Coefficients coefficients_;
    UpdateRule rule_;
    bool coupled_decay_;
};

// ------------------------------------------------------------------------------------------------------------------ all tensors

/// The groups of blocks that tensors consist of.
class Groups {
  public:
    Groups(const std::vector<OptimizerTensor> &tensors, int64_t blocksize)
        : tensors_(tensors), blocksize_(blocksize), blocks_of_group_(std::max<int64_t>(1, group_size / blocksize)) {
        for (const OptimizerTensor &tensor : tensors) {
            elements_ += tensor.n;
            ends_.push_back(count() + (blocks(tensor) + blocks_of_group_ - 1) / blocks_of_group_);
        }
    }

    int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
    int64_t end_of(std::size_t tensor) const { return ends_[tensor]; }

    /// Calls `body(tensor, group, begin, end)` for each group with its first block and the one after its last.
    template <class Body>
    void for_each(int threads, const Body &body) const {
        const int64_t grain = std::max<int64_t>(1, count() * group_size / elements_);  // more, if tensors are small
        parallel_for(threads, count(), grain, [&](int64_t first, int64_t last) {
            std::size_t tensor = static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), first) - ends_.begin());
            for (int64_t group = first; group < last; ++group) {
                if (group == ends_[tensor]) ++tensor;
                const int64_t begin = (group - (tensor ? ends_[tensor - 1] : 0)) * blocks_of_group_;
                body(tensor, group, begin, std::min(begin + blocks_of_group_, blocks(tensors_[tensor])));
            }
        });
    }

  private:
    int64_t blocks(const OptimizerTensor &tensor) const { return (tensor.n + blocksize_ - 1) / blocksize_; }

    const std::vector<OptimizerTensor> &tensors_;
    int64_t blocksize_, blocks_of_group_, elements_ = 0;
    std::vector<int64_t> ends_;  ///< for each tensor, the number of groups up to its end
};

template <class T, class States>
void run(const Step<T, States> &step, const std::vector<OptimizerTensor> &tensors, int64_t blocksize, bool limited, int threads) {
    const Groups groups(tensors, blocksize);
    std::vector<double> trust_ratios(tensors.size(), 1.0);
    if (limited) {
        std::vector<Norms> parts(static_cast<std::size_t>(groups.count()));
        groups.for_each(threads, [&](std::size_t tensor, int64_t group, int64_t begin, int64_t end) {
            parts[static_cast<std::size_t>(group)] = step.norms(tensors[tensor], begin, end);
        });
        std::size_t part = 0;
        for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
            Norms norms;
            for (; static_cast<int64_t>(part) < groups.end_of(tensor); ++part) {
                norms.param += parts[part].param;
                norms.direction += parts[part].direction;
            }
            trust_ratios[tensor] = step.trust_ratio(norms);
        }
    }
    groups.for_each(threads, [&](std::size_t tensor, int64_t, int64_t begin, int64_t end) {
        step.update(tensors[tensor], begin, end, trust_ratios[tensor]);
    });
}

template <class States>
void run(
    DType dtype, const std::vector<OptimizerTensor> &tensors, const States &states, Algorithm algorithm, const Hyperparameters &h,
    int threads) {
    with_type(dtype, [&](auto element) {
        const Step<decltype(element), States> step(states, algorithm, h);
        run(step, tensors, states.blocksize(), h.max_unorm > 0, threads);
    });
}

}  // namespace

void optimizer_step_32bit(
    DType dtype, const std::vector<OptimizerTensor> &tensors, Algorithm algorithm, const Hyperparameters &hyperparameters, int threads) {
    run(dtype, tensors, States32bit(), algorithm, hyperparameters, threads);
}

void optimizer_step_8bit_blockwise(
    DType dtype, const std::vector<OptimizerTensor> &tensors, const std::array<const float *, most_states> &codebooks,
    Algorithm algorithm, const Hyperparameters &hyperparameters, int64_t blocksize, int threads) {
    run(dtype, tensors, States8bit(codebooks, blocksize), algorithm, hyperparameters, threads);
}

}  // namespace bnb
