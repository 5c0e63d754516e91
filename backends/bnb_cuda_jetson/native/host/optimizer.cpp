#include "bindings.h"

namespace bnb {

void bind_optimizer(nanobind::module_&) {}

}  // namespace bnb
