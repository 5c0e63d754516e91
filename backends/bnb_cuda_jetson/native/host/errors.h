// The two ways in which things fail, each a Python exception of bnb_core's tree.
#pragma once

#include <stdexcept>

#include <nanobind/nanobind.h>

namespace bnb {

// There is no driver, or no device that the embedded device code runs on: BackendUnavailableError.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The driver refused or failed something: bnb_cuda_jetson.errors.CudaError. The message names op, device and cause.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void bind_errors(nanobind::module_& module);

}  // namespace bnb
