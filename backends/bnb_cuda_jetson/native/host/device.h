// The devices: what the host code needs to know of each, and its primary context, which is the one that torch uses.
#pragma once

#include <string>

#include "driver.h"

namespace bnb {

constexpr int kMaxDevices = 64;

struct Device {
  int ordinal;
  CUdevice handle;
  std::string name;
  int architecture;  // of the embedded code that runs here; 0 where none does
  int compute_capability;
  int multiprocessors;
  int clock_kilohertz;
  int memory_clock_kilohertz;
  int memory_bus_bits;
  int l2_bytes;
  int shared_bytes;  // that a block may have
  bool integrated;  // shares the memory of the CPU

  // "cuda:0 (Orin)".
  std::string title() const;
};

int device_count();

// The version of CUDA that the driver is made for: 12030 is 12.3.
int driver_version();

// The device of this number. Reading about it makes no context.
const Device& device(int ordinal);

// The primary context of a device, for as long as the object lives: the calling thread may have none, or another device's.
class CurrentContext {
 public:
  explicit CurrentContext(const Device& device);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace bnb
