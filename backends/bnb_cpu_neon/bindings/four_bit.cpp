/// Bindings of the 4-bit ops.
#include "kernels/four_bit.hpp"

#include "arguments.hpp"

namespace bnb {

void bind_four_bit(nb::module_ &module) {
    module.def(
        "quantize_4bit",
        [](DType dtype, Data<const void> x, int64_t n, Data<const float> codebook, int64_t blocksize, Data<uint8_t> packed, Data<float> absmax,
           int threads) { quantize_4bit(dtype, x, n, codebook, blocksize, packed, absmax, threads); },
        without_gil());
    def_with_none(
        module, "dequantize_4bit",
        [](Data<const uint8_t> packed, Data<const void> absmax, Data<const float> codebook, int64_t blocksize, std::optional<Nested> nested, int64_t n, DType dtype,
           Data<void> out, int threads) {
            dequantize_4bit(packed_tensor(packed, absmax, codebook, blocksize, nested), n, dtype, out, threads);
        });
}

}  // namespace bnb
