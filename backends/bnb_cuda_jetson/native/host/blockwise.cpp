#include "bindings.h"

namespace bnb {

void bind_blockwise(nanobind::module_&) {}

}  // namespace bnb
