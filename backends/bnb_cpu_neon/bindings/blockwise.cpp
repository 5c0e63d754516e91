/// Bindings of the 8-bit blockwise ops.
#include "kernels/blockwise.hpp"

#include "arguments.hpp"

namespace bnb {

void bind_blockwise(nb::module_ &module) {
    module.def(
        "quantize_blockwise",
        [](DType dtype, Data<const void> x, int64_t n, Data<const float> codebook, int64_t blocksize, Data<uint8_t> codes,
           Data<float> absmax, int threads) { quantize_blockwise(dtype, x, n, codebook, blocksize, codes, absmax, threads); },
        without_gil());
    module.def(
        "dequantize_blockwise",
        [](Data<const uint8_t> codes, Data<const float> absmax, Data<const float> codebook, int64_t blocksize, int64_t n, DType dtype,
           Data<void> out, int threads) { dequantize_blockwise(codes, absmax, codebook, blocksize, n, dtype, out, threads); },
        without_gil());
}

}  // namespace bnb
