// Lists of tensors as Python passes them: torch's tensors themselves where torch can say at once where they lie, or addresses.
#pragma once

#include <cstdint>
#include <vector>

#include <nanobind/nanobind.h>

#include "driver.h"

namespace bnb {

// The addresses of a list of tensors, or of integers that are addresses. Of tensors, the numbers of elements are added to `sizes`
// where that is given. Needs Python's lock.
std::vector<Address> addresses_of(nanobind::list list, std::vector<std::int64_t>* sizes = nullptr);

void bind_tensors(nanobind::module_& module);

}  // namespace bnb
