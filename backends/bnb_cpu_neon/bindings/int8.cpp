/// Bindings of the int8 ops.
#include "arguments.hpp"

namespace bnb {

void bind_int8(nb::module_ &) {}

}  // namespace bnb
