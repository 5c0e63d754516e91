/// dequantize_4bit: bound by memory on every core, so that one form serves all tiers.
#include "kernels/four_bit.hpp"
#include "parallel.hpp"

namespace bnb {

/// Elements below which a second thread costs more than it saves; even, so that threads never share a byte.
constexpr int64_t grain = 1 << 15;

void dequantize_4bit(const Packed4bit &tensor, int64_t n, DType dtype, void *out, int threads) {
    with_type(dtype, [&](auto element) {
        using T = decltype(element);
        T *values = static_cast<T *>(out);
        parallel_for(threads, n, grain, [&](int64_t begin, int64_t end) {
            dequantize(tensor, Codebook16(tensor.codebook), begin, end, values + begin);
        });
    });
}

}  // namespace bnb
