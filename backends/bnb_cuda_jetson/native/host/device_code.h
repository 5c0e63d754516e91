// The embedded device code: a cubin for each source and architecture.
#pragma once

#include <string>
#include <vector>

namespace bnb {

struct Cubin {
  const char* unit;  // name of the source without its ending
  int architecture;  // compute capability without the dot
  const void* code;
};

extern const Cubin kCubins[];
extern const int kCubinCount;

// The embedded architectures, in order.
std::vector<int> architectures();

// The architecture whose code runs on a device of this compute capability; 0 where there is none.
int architecture_for(int compute_capability);

// "8.7".
std::string dotted(int architecture);

}  // namespace bnb
