#include "errors.h"

namespace nb = nanobind;

namespace bnb {
namespace {

void raise(const char* module, const char* type, const char* message) {
  nb::object exception = nb::module_::import_(module).attr(type);
  PyErr_SetString(exception.ptr(), message);
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const Unavailable& error) {
    raise("bnb_core.errors", "BackendUnavailableError", error.what());
  } catch (const CudaError& error) {
    raise("bnb_cuda_jetson.errors", "CudaError", error.what());
  }
}

}  // namespace

void bind_errors(nb::module_&) { nb::register_exception_translator(translate); }

}  // namespace bnb
