// The part of the CUDA driver's interface that is used here, found in libcuda.so.1 at run time: nothing of CUDA is linked or included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace bnb {

using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUcontext_*;
using CUmodule = struct CUmodule_*;
using CUfunction = struct CUfunction_*;
using CUstream = struct CUstream_*;
using Address = std::uintptr_t;  // of device memory

constexpr CUresult kSuccess = 0;

// Values of the driver's enumerations.
constexpr int kMultiprocessors = 16;           // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kClockKilohertz = 13;            // CU_DEVICE_ATTRIBUTE_CLOCK_RATE
constexpr int kIntegrated = 18;                // CU_DEVICE_ATTRIBUTE_INTEGRATED
constexpr int kMemoryClockKilohertz = 36;      // CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE
constexpr int kMemoryBusBits = 37;             // CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH
constexpr int kL2Bytes = 38;                   // CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
constexpr int kSharedBytes = 97;               // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr int kComputeMajor = 75;              // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kComputeMinor = 76;              // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int kMaxDynamicShared = 8;           // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

// Settings of a launch, as the driver has them. The only attribute that is used here is the one that lets a kernel begin while the one
// before it in the stream is still at work.
struct LaunchAttribute {
  int id = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
  int unused = 0;
  int allowed = 1;
  char rest[60] = {};
};
struct LaunchSettings {
  unsigned grid[3];
  unsigned threads[3];
  unsigned shared_bytes;
  CUstream stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchSettings) == 56, "CUlaunchAttribute and CUlaunchConfig");

struct Driver {
  CUresult (*init)(unsigned);
  CUresult (*driver_version)(int*);
  CUresult (*error_name)(CUresult, const char**);
  CUresult (*error_string)(CUresult, const char**);
  CUresult (*device_count)(int*);
  CUresult (*device_get)(CUdevice*, int);
  CUresult (*device_name)(char*, int, CUdevice);
  CUresult (*device_attribute)(int*, int, CUdevice);
  CUresult (*primary_retain)(CUcontext*, CUdevice);
  CUresult (*context_current)(CUcontext*);
  CUresult (*context_push)(CUcontext);
  CUresult (*context_pop)(CUcontext*);
  CUresult (*module_load)(CUmodule*, const void*);
  CUresult (*module_function)(CUfunction*, CUmodule, const char*);
  CUresult (*function_set)(CUfunction, int, int);
  CUresult (*exchange_capture_mode)(int*);
  CUresult (*blocks_per_multiprocessor)(int*, CUfunction, int, std::size_t);
  CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**);
  // Null where the driver is older than CUDA 12.3, the first in which CUDA graphs take launches with attributes of this kind.
  CUresult (*launch_by_settings)(const LaunchSettings*, CUfunction, void**, void**);
};

// The driver, loaded and initialized at first use. Throws Unavailable with the reason where there is none.
const Driver& driver();

// "CUDA_ERROR_INVALID_VALUE (1): invalid argument".
std::string describe(CUresult result);

}  // namespace bnb
