/// Fuzz target: quantize_blockwise on arbitrary values, codebooks, dtypes and blocksizes gives what the definition says.
#include "kernels/blockwise.hpp"
#include "quantization.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, std::size_t size) {
    const Arguments<256> arguments(bytes, size);
    const int64_t n = arguments.n, blocksize = 1 + arguments.blocksize_byte;
    const std::unique_ptr<uint8_t[]> codes(new uint8_t[static_cast<std::size_t>(n)]);
    const std::unique_ptr<float[]> absmax(new float[static_cast<std::size_t>((n + blocksize - 1) / blocksize)]);
    bnb::quantize_blockwise(arguments.dtype, arguments.values(), n, arguments.codebook.get(), blocksize, codes.get(), absmax.get(), 1);
    if (!arguments.has_order()) return 0;
    const Definition<256> definition(arguments.codebook.get());
    for (int64_t start = 0; start < n; start += blocksize) {
        const int64_t stop = std::min(n, start + blocksize);
        const float largest = Definition<256>::absmax(arguments, start, stop), stored = absmax[start / blocksize];
        CHECK(stored == largest || (std::isnan(stored) && std::isnan(largest)));
        for (int64_t i = start; i < stop; ++i) CHECK(codes[i] == definition.code(arguments.value(i), largest));
    }
    return 0;
}
