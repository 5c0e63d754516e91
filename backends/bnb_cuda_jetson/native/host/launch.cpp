#include "launch.h"

#include <cstring>
#include <map>
#include <mutex>

#include "device_code.h"
#include "errors.h"

namespace bnb {
namespace {

constexpr int kOverlaps = 90;  // the first architecture whose kernels can overlap

std::mutex mutex;
std::map<const void*, CUmodule> modules[kMaxDevices];  // by cubin

// While it lives, this thread may load code although a stream is being captured: that touches no stream.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { driver().exchange_capture_mode(&mode_); }

 private:
  int mode_ = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED
};

[[noreturn]] void fail(const Device& device, const std::string& what, CUresult result) {
  throw CudaError(what + " failed on " + device.title() + ": " + describe(result));
}

const Cubin& find_cubin(const char* unit, const Device& device) {
  for (int i = 0; i < kCubinCount; ++i) {
    if (kCubins[i].architecture == device.architecture && !std::strcmp(kCubins[i].unit, unit)) return kCubins[i];
  }
  std::string embedded;
  for (int architecture : architectures()) embedded += (embedded.empty() ? "" : ", ") + dotted(architecture);
  throw Unavailable(device.title() + " has compute capability " + dotted(device.compute_capability) +
                    "; this build of bnb-cuda-jetson has device code for " + embedded);
}

CUmodule load_module(const Cubin& cubin, const Device& device) {
  CUmodule& module = modules[device.ordinal][cubin.code];
  if (!module) {
    if (CUresult result = driver().module_load(&module, cubin.code)) {
      fail(device, std::string("loading the device code ") + cubin.unit + " for sm_" + std::to_string(cubin.architecture), result);
    }
  }
  return module;
}

}  // namespace

const LoadedKernel& Kernel::load(const Device& device) {
  std::lock_guard<std::mutex> lock(mutex);
  if (const LoadedKernel* loaded = loaded_[device.ordinal].load(std::memory_order_relaxed)) return *loaded;
  RelaxedCapture relaxed;
  CUmodule module = load_module(find_cubin(unit_, device), device);
  LoadedKernel loaded{};
  CUresult result = driver().module_function(&loaded.function, module, name_);
  if (result == kSuccess && shared_bytes_) {
    result = driver().function_set(loaded.function, kMaxDynamicShared, static_cast<int>(shared_bytes_));
  }
  int blocks = 0;
  if (result == kSuccess) {
    result = driver().blocks_per_multiprocessor(&blocks, loaded.function, static_cast<int>(threads_), shared_bytes_);
  }
  if (result != kSuccess) fail(device, std::string("loading the kernel ") + name_, result);
  loaded.resident_blocks = static_cast<unsigned>(blocks * device.multiprocessors);
  const LoadedKernel* kept = new LoadedKernel(loaded);  // for the life of the process
  loaded_[device.ordinal].store(kept, std::memory_order_release);
  return *kept;
}

void Call::run(Kernel& kernel, Grid grid, void** arguments) const {
  const LoadedKernel& loaded = kernel.on(device);
  CUresult result = driver().launch(loaded.function, grid.x, grid.y, grid.z, kernel.threads(), 1, 1, kernel.shared_bytes(), stream,
                                    arguments, nullptr);
  if (result != kSuccess) fail(device, op, result);
}

void Call::run_overlapping(Kernel& kernel, Grid grid, void** arguments) const {
  if (device.architecture < kOverlaps || !driver().launch_by_settings) return run(kernel, grid, arguments);
  const LoadedKernel& loaded = kernel.on(device);
  const LaunchAttribute overlap;
  const LaunchSettings settings{{grid.x, grid.y, grid.z}, {kernel.threads(), 1, 1}, kernel.shared_bytes(), stream, &overlap, 1};
  CUresult result = driver().launch_by_settings(&settings, loaded.function, arguments, nullptr);
  if (result != kSuccess) fail(device, op, result);
}

}  // namespace bnb
