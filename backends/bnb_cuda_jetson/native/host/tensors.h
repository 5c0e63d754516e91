// Lists of tensors as Python passes them: torch's tensors themselves where torch can say at once where they lie, or addresses.
#pragma once

#include <cstdint>
#include <vector>

#include <nanobind/nanobind.h>

#include "driver.h"

namespace bnb {

// The addresses of a list of tensors, or of integers that are addresses. Needs Python's lock.
std::vector<Address> addresses_of(nanobind::handle list);

// The numbers of elements of a list of tensors, or of integers that are such. Needs Python's lock.
std::vector<std::int64_t> sizes_of(nanobind::handle list);

void bind_tensors(nanobind::module_& module);

}  // namespace bnb
