/// dequantize_blockwise: one form for all tiers.
#include <algorithm>

#include "kernels/block256.hpp"
#include "kernels/blockwise.hpp"
#include "parallel.hpp"

namespace bnb {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

void dequantize_blockwise(
    const uint8_t *codes, const float *absmax, const float *codebook, int64_t blocksize, int64_t n, DType dtype, void *out,
    int threads) {
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    with_type(dtype, [&](auto element) {
        auto *values = static_cast<decltype(element) *>(out);
        parallel_for(threads, blocks, std::max<int64_t>(1, grain / blocksize), [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t start = block * blocksize;
                dequantize_block(codes + start, codebook, absmax[block], std::min(blocksize, n - start), values + start);
            }
        });
    });
}

}  // namespace bnb
