/// Bindings of the embedding ops.
#include "kernels/embedding.hpp"

#include "arguments.hpp"

namespace bnb {

void bind_embedding(nb::module_ &module) {
    def_with_none(
        module, "embedding_4bit",
        [](Data<const void> indices, bool wide, int64_t count, Data<const uint8_t> packed, Data<const void> absmax,
           Data<const float> codebook, int64_t blocksize, std::optional<Nested> nested, int64_t width, DType dtype, Data<void> out,
           int threads) {
            const Packed4bit table = packed_tensor(packed, absmax, codebook, blocksize, nested);
            embedding_4bit({indices, wide, count}, table, width, dtype, out, threads);
        });
    module.def(
        "embedding_8bit",
        [](Data<const void> indices, bool wide, int64_t count, Data<const int8_t> codes, Data<const float> absmax, int64_t width,
           DType dtype, Data<void> out, int threads) {
            embedding_8bit({indices, wide, count}, codes, absmax, width, dtype, out, threads);
        },
        without_gil());
}

}  // namespace bnb
