// Entry points of optimizer steps: one launch for as many tensors as fit into a kernel's arguments.
#include "optimizer.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "bindings.h"
#include "launch.h"
#include "tensors.h"

namespace nb = nanobind;

namespace bnb {
namespace {

using Addresses = std::vector<Address>;

constexpr int kPiece = 256;  // elements of a unit of work without blocks, in optimizer.cuh

#define BNB_STEPS(bits, algorithm, threads)                               \
  {                                                                       \
    {"optimizer_" bits, "step_" bits "_" algorithm "_float32", threads},  \
    {"optimizer_" bits, "step_" bits "_" algorithm "_float16", threads},  \
    {"optimizer_" bits, "step_" bits "_" algorithm "_bfloat16", threads}, \
  }
#define BNB_ALGORITHMS(bits, threads)                                                                                \
  {                                                                                                                  \
    BNB_STEPS(bits, "adam", threads), BNB_STEPS(bits, "amsgrad", threads), BNB_STEPS(bits, "ademamix", threads),     \
        BNB_STEPS(bits, "lion", threads), BNB_STEPS(bits, "sgd", threads), BNB_STEPS(bits, "rmsprop", threads),      \
        BNB_STEPS(bits, "adagrad", threads),                                                                         \
  }

constexpr int kAlgorithms = 7;
const char* const kNames[kAlgorithms] = {"adam", "amsgrad", "ademamix", "lion", "sgd", "rmsprop", "adagrad"};
Kernel kernels_32bit[kAlgorithms][kDtypes] = BNB_ALGORITHMS("32bit", 256);
Kernel kernels_8bit[kAlgorithms][kDtypes] = BNB_ALGORITHMS("8bit", 256);
Kernel scalars_kernel("optimizer", "step_scalars", 32);
Kernel ratios_kernel("optimizer", "step_ratios", 256);

// A list for each of a step's tensors, all of them as long as `params` or empty.
struct Lists {
  Addresses params, grads;
  Addresses states[kStates], absmax[kStates];
  std::vector<std::int64_t> sizes;
};

int index_of(const std::string& algorithm) {
  for (int i = 0; i < kAlgorithms; ++i) {
    if (algorithm == kNames[i]) return i;
  }
  throw std::invalid_argument("no optimizer algorithm " + algorithm);
}

// Scratch memory: the scalars, the ratios of a table's tensors, and two float64 sums for each unit of a table's work.
constexpr std::int64_t kScalarsBytes = 256, kRatiosBytes = 256;
static_assert(sizeof(Scalars) <= kScalarsBytes && kTensorsAtOnce * sizeof(float) <= kRatiosBytes);
constexpr int kSumsBytes = 16;

std::int64_t scratch_bytes(const std::vector<std::int64_t>& sizes, std::int64_t blocksize, bool limited) {
  std::int64_t largest = 0;
  for (std::size_t first = 0; first < sizes.size() && limited; first += kTensorsAtOnce) {
    std::int64_t units = 0;
    for (std::size_t i = first; i < sizes.size() && i < first + kTensorsAtOnce; ++i) units += ceil_div(sizes[i], blocksize);
    largest = units > largest ? units : largest;
  }
  return kScalarsBytes + kRatiosBytes + largest * kSumsBytes;
}

StepTensors tensors_from(const Lists& lists, std::size_t first, std::int64_t blocksize, bool quantized, int* count) {
  StepTensors table{};
  std::size_t total = lists.params.size();
  *count = static_cast<int>(total - first < kTensorsAtOnce ? total - first : kTensorsAtOnce);
  for (int i = 0; i < *count; ++i) {
    std::size_t at = first + i;
    StepTensor& tensor = table.tensors[i];
    tensor.param = reinterpret_cast<void*>(lists.params[at]);
    tensor.grad = reinterpret_cast<const void*>(lists.grads[at]);
    Address misaligned = (lists.params[at] | lists.grads[at]) % 16;
    for (int k = 0; k < kStates; ++k) {
      Address state = lists.states[k].empty() ? 0 : lists.states[k][at];
      tensor.states[k] = reinterpret_cast<void*>(state);
      tensor.absmax[k] = reinterpret_cast<float*>(lists.absmax[k].empty() ? 0 : lists.absmax[k][at]);
      misaligned |= state % (quantized ? 8 : 16);
    }
    tensor.n = misaligned ? -lists.sizes[at] : lists.sizes[at];
    table.units += ceil_div(lists.sizes[at], blocksize);
    tensor.end = table.units;
  }
  return table;
}

// `run(table, scalars, ratios, sums)` launches a step, or with sums the measurement for it.
template <class Run>
void step(const Call& call, Kernel& kernel, const Lists& lists, const Hyperparameters& hyperparameters, Address step_on_device,
          Address lr_on_device, Address scratch, std::int64_t blocksize, bool quantized, Run run) {
  Scalars scalars = scalars_of(hyperparameters);
  Address device_scalars = 0;
  if (step_on_device || lr_on_device) {
    device_scalars = scratch;
    launch(call, scalars_kernel, {1}, device_scalars, hyperparameters, step_on_device, lr_on_device);
  }
  bool limited = hyperparameters.max_unorm > 0.0;
  Address ratios = limited ? scratch + kScalarsBytes : 0, sums = scratch + kScalarsBytes + kRatiosBytes, none = 0;
  int count = 0;
  for (std::size_t first = 0; first < lists.params.size(); first += count) {
    StepTensors table = tensors_from(lists, first, blocksize, quantized, &count);
    Grid grid{blocks_for(call, kernel, ceil_div(table.units, kernel.threads() / 32))};
    if (limited) {
      run(grid, table, scalars, device_scalars, none, sums);
      launch(call, ratios_kernel, {static_cast<unsigned>(count)}, ratios, table, sums, scalars.max_unorm);
    }
    run(grid, table, scalars, device_scalars, ratios, none);
  }
}

using Numbers = std::vector<double>;

// In the order of the fields; the glue builds it.
Hyperparameters hyperparameters_from(const Numbers& numbers) {
  Hyperparameters h{};
  double* fields[] = {&h.step,  &h.lr,       &h.beta1,     &h.beta2,    &h.beta3,        &h.alpha,       &h.t_alpha,  &h.t_beta3,
                      &h.eps,   &h.momentum, &h.dampening, &h.lr_decay, &h.weight_decay, &h.gnorm_scale, &h.max_unorm};
  int* flags[] = {&h.decoupled_weight_decay, &h.skip_zeros, &h.nesterov, &h.bias_correction};
  std::size_t at = 0;
  for (double* field : fields) *field = numbers.at(at++);
  for (int* flag : flags) *flag = numbers.at(at++) != 0.0;
  return h;
}

// Lists of tensors are what tensors.h takes; with addresses come the sizes, which otherwise are an empty list.
void optimizer_step_32bit(int device, Address stream, int dtype, nb::list params, nb::list grads, nb::list state1,
                          nb::list state2, nb::list state3, std::vector<std::int64_t> sizes, const std::string& algorithm,
                          const Numbers& hyperparameters, Address step_on_device, Address lr_on_device, Address scratch) {
  Lists lists{addresses_of(params, sizes.empty() ? &sizes : nullptr),
              addresses_of(grads),
              {addresses_of(state1), addresses_of(state2), addresses_of(state3)},
              {},
              std::move(sizes)};
  nb::gil_scoped_release unlocked;
  Call call("optimizer_step_32bit_", device, stream);
  Kernel& kernel = kernels_32bit[index_of(algorithm)][dtype];
  step(call, kernel, lists, hyperparameters_from(hyperparameters), step_on_device, lr_on_device, scratch, kPiece, false,
       [&](Grid grid, const StepTensors& table, const Scalars& scalars, Address device_scalars, Address ratios, Address sums) {
         launch(call, kernel, grid, table, scalars, device_scalars, ratios, sums);
       });
}

void optimizer_step_8bit(int device, Address stream, int dtype, nb::list params, nb::list grads, nb::list state1,
                         nb::list state2, nb::list state3, nb::list absmax1, nb::list absmax2, nb::list absmax3,
                         std::vector<std::int64_t> sizes, Address codebook1, Address codebook2, Address codebook3,
                         std::int64_t blocksize, const std::string& algorithm, const Numbers& hyperparameters,
                         Address step_on_device, Address lr_on_device, Address scratch) {
  Lists lists{addresses_of(params, sizes.empty() ? &sizes : nullptr),
              addresses_of(grads),
              {addresses_of(state1), addresses_of(state2), addresses_of(state3)},
              {addresses_of(absmax1), addresses_of(absmax2), addresses_of(absmax3)},
              std::move(sizes)};
  nb::gil_scoped_release unlocked;
  Call call("optimizer_step_8bit_blockwise_", device, stream);
  Kernel& kernel = kernels_8bit[index_of(algorithm)][dtype];
  step(call, kernel, lists, hyperparameters_from(hyperparameters), step_on_device, lr_on_device, scratch, blocksize, true,
       [&](Grid grid, const StepTensors& table, const Scalars& scalars, Address device_scalars, Address ratios, Address sums) {
         launch(call, kernel, grid, table, scalars, device_scalars, ratios, sums, codebook1, codebook2, codebook3, blocksize);
       });
}

}  // namespace

void bind_optimizer(nanobind::module_& module) {
  module.def("optimizer_step_32bit", &optimizer_step_32bit);
  module.def("optimizer_step_8bit", &optimizer_step_8bit);
  module.def("optimizer_scratch_bytes", &scratch_bytes);
}

}  // namespace bnb
