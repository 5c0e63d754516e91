#include "driver.h"

#include <dlfcn.h>

#include "errors.h"

namespace bnb {
namespace {

constexpr int kGraphsTakeAttributes = 12030;  // CUDA 12.3

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw Unavailable(std::string("the NVIDIA driver's libcuda.so.1 is too old: it has no ") + name);
}

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) {
    const char* why = dlerror();
    throw Unavailable(std::string("no NVIDIA driver: ") + (why ? why : "libcuda.so.1 cannot be opened") +
                      "; install the driver, which a Jetson has with JetPack (in a container: --runtime nvidia)");
  }
  Driver found{};
  find(library, "cuInit", found.init);
  find(library, "cuGetErrorName", found.error_name);
  find(library, "cuGetErrorString", found.error_string);
  find(library, "cuDeviceGetCount", found.device_count);
  find(library, "cuDeviceGet", found.device_get);
  find(library, "cuDeviceGetName", found.device_name);
  find(library, "cuDeviceGetAttribute", found.device_attribute);
  find(library, "cuDevicePrimaryCtxRetain", found.primary_retain);
  find(library, "cuCtxGetCurrent", found.context_current);
  find(library, "cuCtxPushCurrent_v2", found.context_push);
  find(library, "cuCtxPopCurrent_v2", found.context_pop);
  find(library, "cuModuleLoadData", found.module_load);
  find(library, "cuModuleGetFunction", found.module_function);
  find(library, "cuFuncSetAttribute", found.function_set);
  find(library, "cuThreadExchangeStreamCaptureMode", found.exchange_capture_mode);
  find(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", found.blocks_per_multiprocessor);
  find(library, "cuLaunchKernel", found.launch);
  int version = 0;
  find(library, "cuDriverGetVersion", found.driver_version);
  if (!found.driver_version(&version) && version >= kGraphsTakeAttributes) find(library, "cuLaunchKernelEx", found.launch_by_settings);
  return found;
}

std::string describe_by(const Driver& driver, CUresult result) {
  const char *name = nullptr, *text = nullptr;
  driver.error_name(result, &name);
  driver.error_string(result, &text);
  return std::string(name ? name : "unknown CUDA error") + " (" + std::to_string(result) + ")" + (text ? std::string(": ") + text : "");
}

Driver start() {
  Driver found = load();
  if (CUresult result = found.init(0)) throw Unavailable("the NVIDIA driver does not start: " + describe_by(found, result));
  return found;
}

}  // namespace

const Driver& driver() {
  static const Driver found = start();  // where it throws, the next call tries again
  return found;
}

std::string describe(CUresult result) { return describe_by(driver(), result); }

}  // namespace bnb
