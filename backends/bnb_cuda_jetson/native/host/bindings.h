// The entry points of each op family, one source a family.
#pragma once

#include <nanobind/nanobind.h>

namespace bnb {

void bind_blockwise(nanobind::module_& module);
void bind_four_bit(nanobind::module_& module);
void bind_embedding(nanobind::module_& module);
void bind_gemm_4bit(nanobind::module_& module);
void bind_gemm_4bit_any(nanobind::module_& module);
void bind_int8(nanobind::module_& module);
void bind_optimizer(nanobind::module_& module);

// Entry points run without Python's lock: a launch may wait for room in the device's queue.
using NoLock = nanobind::call_guard<nanobind::gil_scoped_release>;

}  // namespace bnb
