#include "device.h"

#include <atomic>
#include <memory>
#include <mutex>

#include "device_code.h"
#include "errors.h"

namespace bnb {
namespace {

std::mutex mutex;
std::atomic<const Device*> devices[kMaxDevices];
std::atomic<CUcontext> primary_contexts[kMaxDevices];

void require(CUresult result, const char* what) {
  if (result != kSuccess) throw CudaError(std::string(what) + " failed: " + describe(result));
}

int attribute(CUdevice handle, int which) {
  int value = 0;
  require(driver().device_attribute(&value, which, handle), "reading a device's attributes");
  return value;
}

const Device* inspect(int ordinal) {
  auto found = std::make_unique<Device>();
  require(driver().device_get(&found->handle, ordinal), "looking for a device");
  char name[256] = {};
  require(driver().device_name(name, sizeof(name), found->handle), "reading a device's name");
  found->ordinal = ordinal;
  found->name = name;
  found->compute_capability = attribute(found->handle, kComputeMajor) * 10 + attribute(found->handle, kComputeMinor);
  found->architecture = architecture_for(found->compute_capability);
  found->multiprocessors = attribute(found->handle, kMultiprocessors);
  found->clock_kilohertz = attribute(found->handle, kClockKilohertz);
  found->memory_clock_kilohertz = attribute(found->handle, kMemoryClockKilohertz);
  found->memory_bus_bits = attribute(found->handle, kMemoryBusBits);
  found->l2_bytes = attribute(found->handle, kL2Bytes);
  found->shared_bytes = attribute(found->handle, kSharedBytes);
  found->integrated = attribute(found->handle, kIntegrated);
  return found.release();  // kept for the life of the process
}

CUcontext primary_context(const Device& device) {
  CUcontext context = primary_contexts[device.ordinal].load(std::memory_order_acquire);
  if (!context) {
    CUresult result = driver().primary_retain(&context, device.handle);
    if (result != kSuccess) throw CudaError("the primary context of " + device.title() + " cannot be had: " + describe(result));
    primary_contexts[device.ordinal].store(context, std::memory_order_release);
  }
  return context;
}

}  // namespace

std::string Device::title() const { return "cuda:" + std::to_string(ordinal) + " (" + name + ")"; }

int device_count() {
  int count = 0;
  require(driver().device_count(&count), "counting the devices");
  return count;
}

int driver_version() {
  int version = 0;
  require(driver().driver_version(&version), "reading the driver's version");
  return version;
}

const Device& device(int ordinal) {
  if (ordinal < 0 || ordinal >= kMaxDevices) throw CudaError("there is no device cuda:" + std::to_string(ordinal));
  const Device* found = devices[ordinal].load(std::memory_order_acquire);
  if (!found) {
    std::lock_guard<std::mutex> lock(mutex);
    found = devices[ordinal].load(std::memory_order_relaxed);
    if (!found) {
      found = inspect(ordinal);
      devices[ordinal].store(found, std::memory_order_release);
    }
  }
  return *found;
}

CurrentContext::CurrentContext(const Device& device) {
  CUcontext wanted = primary_context(device), current = nullptr;
  driver().context_current(&current);
  if (current == wanted) return;
  CUresult result = driver().context_push(wanted);
  if (result != kSuccess) throw CudaError("the context of " + device.title() + " cannot be made current: " + describe(result));
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  CUcontext popped;
  if (pushed_) driver().context_pop(&popped);
}

}  // namespace bnb
