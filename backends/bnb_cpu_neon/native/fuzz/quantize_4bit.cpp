/// Fuzz target: quantize_4bit on arbitrary values, codebooks, dtypes and blocksizes gives what the definition says.
#include "kernels/four_bit.hpp"
#include "quantization.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, std::size_t size) {
    const Arguments<16> arguments(bytes, size);
    const int64_t n = arguments.n, blocksize = int64_t{32} << arguments.blocksize_byte % 8;
    const std::unique_ptr<uint8_t[]> packed(new uint8_t[static_cast<std::size_t>(n + 1) / 2]);
    const std::unique_ptr<float[]> absmax(new float[static_cast<std::size_t>((n + blocksize - 1) / blocksize)]);
    bnb::quantize_4bit(arguments.dtype, arguments.values(), n, arguments.codebook.get(), blocksize, packed.get(), absmax.get(), 1);
    if (!arguments.has_order()) return 0;
    const Definition<16> definition(arguments.codebook.get());
    for (int64_t start = 0; start < n; start += blocksize) {
        const int64_t stop = std::min(n, start + blocksize);
        const float largest = Definition<16>::absmax(arguments, start, stop), stored = absmax[start / blocksize];
        CHECK(stored == largest || (std::isnan(stored) && std::isnan(largest)));
        for (int64_t i = start; i < stop; ++i) {
            const int found = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
            CHECK(found == definition.code(arguments.value(i), largest));
        }
    }
    if (n % 2) CHECK((packed[n / 2] & 15) == definition.code(0, 1));
    return 0;
}
