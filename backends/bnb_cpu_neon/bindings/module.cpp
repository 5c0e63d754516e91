/// The Python module: one call a kernel, and the tier that they use.
#include "arguments.hpp"
#include "tier.hpp"

NB_MODULE(_native, module) {
    module.attr("__version__") = BNB_NEON_VERSION;
    module.def("set_tier", [](int tier) { bnb::set_tier(static_cast<bnb::Tier>(tier)); });
    bnb::bind_blockwise(module);
    bnb::bind_embedding(module);
    bnb::bind_four_bit(module);
    bnb::bind_gemm_4bit(module);
    bnb::bind_int8(module);
    bnb::bind_optimizer(module);
}
