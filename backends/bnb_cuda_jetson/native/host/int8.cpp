#include "bindings.h"

namespace bnb {

void bind_int8(nanobind::module_&) {}

}  // namespace bnb
