/// Bindings of the 8-bit blockwise ops.
#include "arguments.hpp"

namespace bnb {

void bind_blockwise(nb::module_ &) {}

}  // namespace bnb
