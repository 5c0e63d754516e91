/// The optimizer steps against plain loops in float64, over lists of tensors, between guard pages.
#include <cmath>
#include <limits>
#include <memory>

#include "check.hpp"
#include "kernels/block256.hpp"
#include "kernels/optimizer.hpp"

using bnb::Algorithm;
using bnb::DType;
using bnb::Hyperparameters;

namespace {

std::mt19937 generator(0);

float random_value() { return std::normal_distribution<float>()(generator); }

Hyperparameters hyperparameters() {
    Hyperparameters h{};
    h.beta1 = 0.9;
    h.beta2 = 0.99;
    h.beta3 = 0.999;
    h.alpha = 2;
    h.eps = 1e-3;
    h.gnorm_scale = 1;
    h.bias_correction = true;
    h.step = 3;
    h.lr = 0.1;
    return h;
}

/// A parameter with states of float32, or of codes over a linear codebook.
struct Tensor {
    Guarded<float> param, grad;
    std::vector<std::unique_ptr<Guarded<float>>> states, absmax;
    std::vector<std::unique_ptr<Guarded<uint8_t>>> codes;

    Tensor(std::size_t n, std::size_t count, std::size_t blocksize, const std::vector<float> &codebook) : param(n), grad(n) {
        for (std::size_t i = 0; i < n; ++i) {
            param[i] = random_value();
            grad[i] = random_value();
        }
        for (std::size_t state = 0; state < count; ++state) {
            states.push_back(std::make_unique<Guarded<float>>(n));
            for (std::size_t i = 0; i < n; ++i) (*states[state])[i] = std::abs(random_value());
            codes.push_back(std::make_unique<Guarded<uint8_t>>(n));
            absmax.push_back(std::make_unique<Guarded<float>>((n + blocksize - 1) / blocksize));
            for (std::size_t i = 0; i < n; ++i) (*codes[state])[i] = static_cast<uint8_t>(128 + generator() % 128);
            for (float *scale = absmax[state]->begin(); scale != absmax[state]->end_of(); ++scale) *scale = 1.5f;
            for (std::size_t i = 0; !codebook.empty() && i < n; ++i) (*states[state])[i] = codebook[(*codes[state])[i]] * 1.5f;
        }
    }

    bnb::OptimizerTensor view(bool coded) {
        bnb::OptimizerTensor tensor{param.data(), grad.data(), {}, {}, static_cast<int64_t>(param.size())};
        for (std::size_t state = 0; state < states.size(); ++state) {
            tensor.states[state] = coded ? static_cast<void *>(codes[state]->data()) : states[state]->data();
            if (coded) tensor.absmax[state] = absmax[state]->data();
        }
        return tensor;
    }
};

bool near(double actual, double expected) { return std::abs(actual - expected) <= 1e-5 * (1 + std::abs(expected)); }

std::vector<float> linear_codebook() {
    std::vector<float> entries;
    for (int i = 0; i < 256; ++i) entries.push_back(static_cast<float>(i - 127) / 128);
    return entries;
}

}  // namespace

TEST(optimizer_adam_of_every_size) {
    Hyperparameters h = hyperparameters();
    h.weight_decay = 0.5;
    h.decoupled_weight_decay = true;
    for (std::size_t n = 1; n <= 257; n += n < 40 ? 1 : 31) {
        Tensor tensor(n, 2, 256, {});
        std::vector<double> p(n), m(n), v(n);
        for (std::size_t i = 0; i < n; ++i) {
            const double g = tensor.grad[i];
            m[i] = 0.9 * (*tensor.states[0])[i] + 0.1 * g;
            v[i] = 0.99 * (*tensor.states[1])[i] + 0.01 * g * g;
            const double direction = m[i] / (1 - std::pow(0.9, 3)) / (std::sqrt(v[i] / (1 - std::pow(0.99, 3))) + 1e-3);
            p[i] = tensor.param[i] * (1 - 0.1 * 0.5) - 0.1 * direction;
        }
        bnb::optimizer_step_32bit(DType::float32, {tensor.view(false)}, Algorithm::adam, h, 1);
        for (std::size_t i = 0; i < n; ++i) {
            CHECK(near(tensor.param[i], p[i]) && near((*tensor.states[0])[i], m[i]) && near((*tensor.states[1])[i], v[i]));
        }
    }
}

TEST(optimizer_8bit_states_are_those_of_32bit_quantized) {
    const std::vector<float> codebook = linear_codebook();
    const auto prepared = bnb::Codebook256::of(codebook.data());
    for (Algorithm algorithm : {Algorithm::adam, Algorithm::lion, Algorithm::ademamix, Algorithm::rmsprop, Algorithm::adagrad}) {
        for (std::size_t blocksize : {64, 100, 256, 1000}) {
            for (std::size_t n : {1, 15, 16, 255, 256, 257, 2100}) {
                Hyperparameters h = hyperparameters();
                h.eps = 1e-2;
                const std::size_t count = algorithm == Algorithm::adam ? 2 : algorithm == Algorithm::ademamix ? 3 : 1;
                Tensor coded(n, count, blocksize, codebook);
                Tensor plain(n, count, blocksize, {});
                std::copy(coded.param.begin(), coded.param.end_of(), plain.param.begin());
                std::copy(coded.grad.begin(), coded.grad.end_of(), plain.grad.begin());
                for (std::size_t state = 0; state < count; ++state) {
                    std::copy(coded.states[state]->begin(), coded.states[state]->end_of(), plain.states[state]->begin());
                }
                bnb::optimizer_step_32bit(DType::float32, {plain.view(false)}, algorithm, h, 1);
                bnb::optimizer_step_8bit_blockwise(
                    DType::float32, {coded.view(true)}, {codebook.data(), codebook.data(), codebook.data()}, algorithm, h,
                    static_cast<int64_t>(blocksize), 2);
                for (std::size_t i = 0; i < n; ++i) CHECK(near(coded.param[i], plain.param[i]));
                for (std::size_t state = 0; state < count; ++state) {
                    std::vector<uint8_t> codes(blocksize);
                    for (std::size_t first = 0; first < n; first += blocksize) {
                        const std::size_t length = std::min(blocksize, n - first);
                        const float absmax = bnb::quantize_block(
                            *prepared, plain.states[state]->data() + first, static_cast<int64_t>(length), codes.data());
                        CHECK(near((*coded.absmax[state])[first / blocksize], absmax));
                        for (std::size_t i = 0; i < length; ++i) CHECK(std::abs((*coded.codes[state])[first + i] - codes[i]) <= 1);
                    }
                }
            }
        }
    }
}

TEST(optimizer_leaves_elements_with_bad_gradients_alone) {
    const std::vector<float> codebook = linear_codebook();
    for (float bad : {std::numeric_limits<float>::infinity(), std::nanf(""), 0.0f}) {
        for (std::size_t at : {0, 7, 255, 299}) {
            Hyperparameters h = hyperparameters();
            h.skip_zeros = true;
            h.weight_decay = 0.1;
            Tensor tensor(300, 2, 256, codebook);
            tensor.grad[at] = bad;
            const float param = tensor.param[at], m = (*tensor.states[0])[at];
            bnb::optimizer_step_32bit(DType::float32, {tensor.view(false)}, Algorithm::adam, h, 1);
            CHECK(tensor.param[at] == param && (*tensor.states[0])[at] == m);
            bnb::optimizer_step_8bit_blockwise(
                DType::float32, {tensor.view(true)}, {codebook.data(), codebook.data(), nullptr}, Algorithm::adam, h, 256, 1);
            CHECK(tensor.param[at] == param);
            for (std::size_t i = 0; i < 300; ++i) CHECK(std::isfinite(tensor.param[i]));
        }
    }
}

TEST(optimizer_lion_knows_the_sign_of_everything) {
    const float values[] = {0.0f, -0.0f, 0x1p-149f, -0x1p-149f, 3e38f, -3e38f, 1.0f, -1.0f};
    Hyperparameters h = hyperparameters();
    h.beta1 = 0;
    Tensor tensor(8, 1, 256, {});
    std::fill(tensor.param.begin(), tensor.param.end_of(), 0.0f);
    std::fill(tensor.states[0]->begin(), tensor.states[0]->end_of(), -0.0f);
    std::copy(values, values + 8, tensor.grad.begin());
    bnb::optimizer_step_32bit(DType::float32, {tensor.view(false)}, Algorithm::lion, h, 1);
    const float step = static_cast<float>(h.lr);
    const float expected[] = {0, 0, -step, step, -step, step, -step, step};
    for (std::size_t i = 0; i < 8; ++i) CHECK(tensor.param[i] == expected[i]);
}

TEST(optimizer_norms_do_not_depend_on_threads) {
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 5}) {
        generator.seed(7);
        Hyperparameters h = hyperparameters();
        h.max_unorm = 0.01;
        std::vector<std::unique_ptr<Tensor>> tensors;
        std::vector<bnb::OptimizerTensor> views;
        for (std::size_t n : {1, 300, 40000, 5, 70000}) {
            tensors.push_back(std::make_unique<Tensor>(n, 2, 256, std::vector<float>()));
            views.push_back(tensors.back()->view(false));
        }
        bnb::optimizer_step_32bit(DType::float32, views, Algorithm::adam, h, threads);
        results.emplace_back();
        for (const auto &tensor : tensors) results.back().insert(results.back().end(), tensor->param.begin(), tensor->param.end_of());
    }
    CHECK(results[0] == results[1] && results[0] == results[2]);
}
