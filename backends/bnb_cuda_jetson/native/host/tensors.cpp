#include "tensors.h"

namespace nb = nanobind;

namespace bnb {
namespace {

// What is used of the exchange of tensors that DLPack 1 specifies (dmlc.github.io/dlpack), which torch has from 2.10 on.
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t dimensions;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLPackExchange {
  std::uint32_t major, minor;
  void* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*describe)(void* object, DLTensor* out);  // refers to the tensor's own shape
  void* current_stream;
};

constexpr std::uint32_t kKnownMajor = 1;

const DLPackExchange* exchange = nullptr;

// Take this way from now on: `capsule` is torch.Tensor.__dlpack_c_exchange_api__. False where it is of another version.
bool use_exchange(nb::handle capsule) {
  const auto* found = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!found) throw nb::python_error();
  if (found->major != kKnownMajor || !found->describe) return false;
  exchange = found;
  return true;
}

std::int64_t elements(const DLTensor& tensor) {
  std::int64_t n = 1;
  for (std::int32_t i = 0; i < tensor.dimensions; ++i) n *= tensor.shape[i];
  return n;
}

}  // namespace

std::vector<Address> addresses_of(nb::list list, std::vector<std::int64_t>* sizes) {
  std::vector<Address> addresses;
  addresses.reserve(list.size());
  for (nb::handle item : list) {
    if (PyLong_Check(item.ptr())) {
      addresses.push_back(nb::cast<Address>(item));
      continue;
    }
    DLTensor tensor;
    if (!exchange) throw nb::type_error("tensors are taken after use_exchange; pass their addresses");
    if (exchange->describe(item.ptr(), &tensor)) throw nb::python_error();
    addresses.push_back(reinterpret_cast<Address>(tensor.data) + tensor.byte_offset);
    if (sizes) sizes->push_back(elements(tensor));
  }
  return addresses;
}

void bind_tensors(nb::module_& module) {
  module.def("use_exchange", &use_exchange, nb::arg("capsule"), "Take tensors by DLPack's exchange API; says whether that can be.");
}

}  // namespace bnb
