// The one way in which kernels are loaded and launched.
#pragma once

#include <atomic>

#include "device.h"
#include "driver.h"

namespace bnb {

// A kernel on one device, ready to run.
struct LoadedKernel {
  CUfunction function;
  unsigned resident_blocks;  // that run at the same time on the whole device
};

// A kernel of the embedded device code, loaded on each device at first use. Make it static.
class Kernel {
 public:
  // unit: name of the source without its ending. shared_bytes: of dynamic shared memory, beyond what the kernel declares.
  constexpr Kernel(const char* unit, const char* name, unsigned threads, unsigned shared_bytes = 0)
      : unit_(unit), name_(name), threads_(threads), shared_bytes_(shared_bytes) {}

  unsigned threads() const { return threads_; }
  unsigned shared_bytes() const { return shared_bytes_; }
  // Whether a block may have its shared memory there: the dynamic, and up to 1 KB that the kernel declares.
  bool fits(const Device& device) const { return shared_bytes_ + 1024 <= static_cast<unsigned>(device.shared_bytes); }
  const LoadedKernel& on(const Device& device) {
    const LoadedKernel* loaded = loaded_[device.ordinal].load(std::memory_order_acquire);
    return loaded ? *loaded : load(device);
  }

 private:
  const LoadedKernel& load(const Device& device);

  const char* unit_;
  const char* name_;
  unsigned threads_;
  unsigned shared_bytes_;
  std::atomic<const LoadedKernel*> loaded_[kMaxDevices] = {};
};

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Where a call runs, and what it is called in errors.
struct Call {
  const char* op;
  const Device& device;
  CUstream stream;

  Call(const char* op, int ordinal, Address stream)
      : op(op), device(bnb::device(ordinal)), stream(reinterpret_cast<CUstream>(stream)), context_(this->device) {}

  void run(Kernel& kernel, Grid grid, void** arguments) const;
  void run_overlapping(Kernel& kernel, Grid grid, void** arguments) const;

 private:
  CurrentContext context_;
};

// Launch `kernel` with exactly these arguments, whose types must be those of the device code's parameters.
template <class... Arguments>
void launch(const Call& call, Kernel& kernel, Grid grid, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  call.run(kernel, grid, pointers);
}

// The same, for kernels that may begin while the one before them is still at work: those of native/device/overlap.cuh.
template <class... Arguments>
void launch_overlapping(const Call& call, Kernel& kernel, Grid grid, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  call.run_overlapping(kernel, grid, pointers);
}

// Blocks for `tiles` pieces of work, for kernels whose blocks go on to further pieces: all, but no more than run at once.
inline unsigned blocks_for(const Call& call, Kernel& kernel, std::int64_t tiles) {
  std::int64_t resident = kernel.on(call.device).resident_blocks;
  return static_cast<unsigned>(tiles < resident ? tiles : resident);
}

}  // namespace bnb
