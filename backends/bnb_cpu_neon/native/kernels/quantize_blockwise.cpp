/// quantize_blockwise: one form for all tiers.
#include <algorithm>

#include "kernels/block256.hpp"
#include "kernels/blockwise.hpp"
#include "parallel.hpp"

namespace bnb {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 14;

void quantize_blockwise(
    DType dtype, const void *x, int64_t n, const float *codebook, int64_t blocksize, uint8_t *codes, float *absmax, int threads) {
    const std::shared_ptr<const Codebook256> prepared = Codebook256::of(codebook);
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    with_type(dtype, [&](auto element) {
        const auto *values = static_cast<const decltype(element) *>(x);
        parallel_for(threads, blocks, std::max<int64_t>(1, grain / blocksize), [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t start = block * blocksize;
                absmax[block] = quantize_block(*prepared, values + start, std::min(blocksize, n - start), codes + start);
            }
        });
    });
}

}  // namespace bnb
