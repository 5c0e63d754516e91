/// Bindings of the optimizer steps.
#include "arguments.hpp"

namespace bnb {

void bind_optimizer(nb::module_ &) {}

}  // namespace bnb
