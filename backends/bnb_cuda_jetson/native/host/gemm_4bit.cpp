#include "bindings.h"

namespace bnb {

void bind_gemm_4bit(nanobind::module_&) {}

}  // namespace bnb
