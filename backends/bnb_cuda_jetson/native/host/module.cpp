#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "device.h"
#include "device_code.h"
#include "errors.h"
#include "tensors.h"

namespace nb = nanobind;

NB_MODULE(_native, module) {
  module.doc() = "Kernels of bnb-cuda-jetson, launched through the CUDA driver.";
  bnb::bind_errors(module);
  nb::class_<bnb::Device>(module, "Device", "What is known of a CUDA device without making a context on it.")
      .def_ro("name", &bnb::Device::name)
      .def_ro("architecture", &bnb::Device::architecture, "Of the embedded code that runs here, such as 87; 0 where none does.")
      .def_ro("compute_capability", &bnb::Device::compute_capability, "Without the dot, such as 87.")
      .def_ro("multiprocessors", &bnb::Device::multiprocessors)
      .def_ro("clock_kilohertz", &bnb::Device::clock_kilohertz)
      .def_ro("memory_clock_kilohertz", &bnb::Device::memory_clock_kilohertz)
      .def_ro("memory_bus_bits", &bnb::Device::memory_bus_bits)
      .def_ro("l2_bytes", &bnb::Device::l2_bytes)
      .def_ro("integrated", &bnb::Device::integrated, "Whether it shares the memory of the CPU, as on a Jetson.");
  module.def("architectures", &bnb::architectures, "The architectures that device code is embedded for, such as [72, 87, 110].");
  module.def("device_count", &bnb::device_count, "The number of CUDA devices; raises where there is no driver.");
  module.def("driver_version", &bnb::driver_version, "The version of CUDA that the driver is made for: 12030 is 12.3.");
  module.def("device", &bnb::device, nb::arg("ordinal"), nb::rv_policy::reference, "What is known of a device.");
  bnb::bind_tensors(module);
  bnb::bind_blockwise(module);
  bnb::bind_four_bit(module);
  bnb::bind_embedding(module);
  bnb::bind_gemm_4bit(module);
  bnb::bind_gemm_4bit_any(module);
  bnb::bind_int8(module);
  bnb::bind_optimizer(module);
}
