// A libcuda.so.1 for tests: devices as FAKE_CAPABILITIES says ("87,72"), and a line of text for each call that matters, in FAKE_LOG.
// FAKE_FAILURE ("cuLaunchKernel=700") makes a call fail; FAKE_CURRENT (a device's number) is the device whose context is current.
// FAKE_ATTRIBUTES ("16=132,13=1980000") sets attributes of the devices, by their numbers in cuda.h.
// FAKE_VERSION is the version of the driver (12020 for CUDA 12.2). FAKE_WORDS says how much of a launch's first argument is written, in
// words of 8 bytes; one without.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

std::vector<int> capabilities() {
  std::vector<int> found;
  const char* text = getenv("FAKE_CAPABILITIES");
  for (std::string rest = text ? text : ""; !rest.empty();) {
    found.push_back(atoi(rest.c_str()));
    std::size_t comma = rest.find(',');
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
  }
  return found;
}

// The number after "KEY=" in a list of such pairs that an environment variable has.
bool find_setting(const char* variable, int key, int* value) {
  const char* text = getenv(variable);
  const std::string rest = std::string(",") + (text ? text : ""), wanted = "," + std::to_string(key) + "=";
  const std::size_t found = rest.find(wanted);
  if (found == std::string::npos) return false;
  *value = atoi(rest.c_str() + found + wanted.size());
  return true;
}

int outcome(const char* call) {
  const char* failure = getenv("FAKE_FAILURE");
  std::size_t length = strlen(call);
  return failure && !strncmp(failure, call, length) && failure[length] == '=' ? atoi(failure + length + 1) : 0;
}

template <class... Arguments>
int log(const char* call, const char* format, Arguments... arguments) {
  if (FILE* file = fopen(getenv("FAKE_LOG"), "a")) {
    fprintf(file, "%s ", call);
    fprintf(file, format, arguments...);
    fputc('\n', file);
    fclose(file);
  }
  return outcome(call);
}

struct Function {
  std::string name;
};

int log_launch(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, void* stream, void** arguments, const char* how) {
  const char* wanted = getenv("FAKE_WORDS");
  const auto* words = static_cast<unsigned long long*>(arguments[0]);
  std::string first = std::to_string(words[0]);
  for (int i = 1; wanted && i < atoi(wanted); ++i) first += "," + std::to_string(words[i]);
  return log("cuLaunchKernel", "%s %ux%ux%u %u stream=%td first=%s%s", static_cast<Function*>(function)->name.c_str(), x, y, z, threads,
             reinterpret_cast<std::intptr_t>(stream), first.c_str(), how);
}

std::vector<std::intptr_t> contexts;  // pushed; a context is its device's number, plus 1

}  // namespace

extern "C" {

int cuInit(unsigned) { return outcome("cuInit"); }
int cuGetErrorName(int error, const char** name) { return *name = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER", 0; }
int cuGetErrorString(int error, const char** text) { return *text = error == 700 ? "an illegal memory access" : "another failure", 0; }
int cuDeviceGetCount(int* count) { return *count = static_cast<int>(capabilities().size()), 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "Fake %d", capabilities().at(device)), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (find_setting("FAKE_ATTRIBUTES", attribute, value)) return 0;
  int capability = capabilities().at(device);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 16 ? 8 : attribute == 18 ? 0 : attribute == 97 ? 227 << 10 : 1000;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(static_cast<std::intptr_t>(device + 1));
  return log("cuDevicePrimaryCtxRetain", "%d", device);
}
int cuCtxGetCurrent(void** context) {
  const char* current = getenv("FAKE_CURRENT");
  *context = reinterpret_cast<void*>(!contexts.empty() ? contexts.back() : current ? atoi(current) + 1 : 0);
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(reinterpret_cast<std::intptr_t>(context));
  return log("cuCtxPushCurrent", "%d", static_cast<int>(contexts.back() - 1));
}
int cuCtxPopCurrent_v2(void**) { return contexts.pop_back(), log("cuCtxPopCurrent", ""); }
int cuModuleLoadData(void** module, const void* image) {
  std::uint32_t flags;  // of the ELF header; the architecture is in its lowest byte, or in the next in newer files
  memcpy(&flags, static_cast<const char*>(image) + 48, 4);
  *module = const_cast<void*>(image);
  return log("cuModuleLoadData", "%d", static_cast<const unsigned char*>(image)[7] == 65 ? flags >> 8 & 255 : flags & 255);
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = new Function{name};
  return log("cuModuleGetFunction", "%s", name);
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, std::size_t) { return *blocks = 2, 0; }
int cuDriverGetVersion(int* version) {
  const char* wanted = getenv("FAKE_VERSION");
  return *version = wanted ? atoi(wanted) : 13000, 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned, void* stream,
                   void** arguments, void**) {
  return log_launch(function, x, y, z, threads, stream, arguments, "");
}
struct Settings {
  unsigned grid[3], threads[3], shared_bytes;
  void* stream;
  const int* attributes;  // an identifier, nothing, a value
  unsigned attribute_count;
};
int cuLaunchKernelEx(const Settings* settings, void* function, void** arguments, void**) {
  const bool overlaps = settings->attribute_count == 1 && settings->attributes[0] == 6 && settings->attributes[2] == 1;
  return log_launch(function, settings->grid[0], settings->grid[1], settings->grid[2], settings->threads[0], settings->stream, arguments,
                    overlaps ? " overlapping" : "");
}

}  // extern "C"
