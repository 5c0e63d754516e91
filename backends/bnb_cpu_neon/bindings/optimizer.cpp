/// Bindings of the optimizer steps.
#include "kernels/optimizer.hpp"

#include "arguments.hpp"

namespace bnb {
namespace {

/// The addresses of tensors in a list that has one for each parameter, or none.
template <class Pointer>
void read_addresses(nb::list tensors, std::vector<OptimizerTensor> &into, const Pointer &pointer) {
    std::size_t i = 0;
    for (nb::handle tensor : tensors) {
        auto &address = pointer(into[i++]);
        address = reinterpret_cast<std::decay_t<decltype(address)>>(nb::detail::address(tensor));
    }
}

std::vector<OptimizerTensor> read_tensors(nb::list params, nb::list grads, nb::list states) {
    std::vector<OptimizerTensor> tensors(nb::len(params));
    std::size_t i = 0;
    for (nb::handle param : params) tensors[i++].n = nb::cast<int64_t>(param.attr("numel")());
    read_addresses(params, tensors, [](OptimizerTensor &tensor) -> auto & { return tensor.param; });
    read_addresses(grads, tensors, [](OptimizerTensor &tensor) -> auto & { return tensor.grad; });
    for (std::size_t state = 0; state < most_states; ++state) {
        read_addresses(nb::cast<nb::list>(states[state]), tensors, [&](OptimizerTensor &tensor) -> auto & { return tensor.states[state]; });
    }
    return tensors;
}

Hyperparameters read_hyperparameters(nb::handle given, double step, double lr) {
    Hyperparameters h;
    const auto read = [&](const char *name, auto &value) { value = nb::cast<std::decay_t<decltype(value)>>(given.attr(name)); };
    read("beta1", h.beta1);
    read("beta2", h.beta2);
    read("beta3", h.beta3);
    read("alpha", h.alpha);
    read("t_alpha", h.t_alpha);
    read("t_beta3", h.t_beta3);
    read("eps", h.eps);
    read("momentum", h.momentum);
    read("dampening", h.dampening);
    read("lr_decay", h.lr_decay);
    read("weight_decay", h.weight_decay);
    read("decoupled_weight_decay", h.decoupled_weight_decay);
    read("gnorm_scale", h.gnorm_scale);
    read("max_unorm", h.max_unorm);
    read("skip_zeros", h.skip_zeros);
    read("nesterov", h.nesterov);
    read("centered", h.centered);
    read("amsgrad", h.amsgrad);
    read("bias_correction", h.bias_correction);
    h.step = step;
    h.lr = lr;
    return h;
}

}  // namespace

void bind_optimizer(nb::module_ &module) {
    module.def(
        "optimizer_step_32bit",
        [](DType dtype, nb::list params, nb::list grads, nb::list states, int algorithm, nb::handle hyperparameters, double step, double lr,
           int threads) {
            const std::vector<OptimizerTensor> tensors = read_tensors(params, grads, states);
            const Hyperparameters h = read_hyperparameters(hyperparameters, step, lr);
            const nb::gil_scoped_release released;
            optimizer_step_32bit(dtype, tensors, static_cast<Algorithm>(algorithm), h, threads);
        });
    module.def(
        "optimizer_step_8bit_blockwise",
        [](DType dtype, nb::list params, nb::list grads, nb::list states, nb::list absmax, nb::list codebooks, int algorithm,
           nb::handle hyperparameters, double step, double lr, int64_t blocksize, int threads) {
            std::vector<OptimizerTensor> tensors = read_tensors(params, grads, states);
            std::array<const float *, most_states> entries{};
            for (std::size_t state = 0; state < most_states; ++state) {
                if (nb::len(nb::cast<nb::list>(states[state])) == 0) continue;
                entries[state] = reinterpret_cast<const float *>(nb::detail::address(codebooks[state]));
                read_addresses(
                    nb::cast<nb::list>(absmax[state]), tensors, [&](OptimizerTensor &tensor) -> auto & { return tensor.absmax[state]; });
            }
            const Hyperparameters h = read_hyperparameters(hyperparameters, step, lr);
            const nb::gil_scoped_release released;
            optimizer_step_8bit_blockwise(dtype, tensors, entries, static_cast<Algorithm>(algorithm), h, blocksize, threads);
        });
}

}  // namespace bnb
