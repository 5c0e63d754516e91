/// quantize_blockwise: one form for all tiers.
#include <cmath>
#include <cstring>

#include "kernels/blocks.hpp"
#include "kernels/blockwise.hpp"
#include "kernels/codebook256.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 14;
/// Elements that are quantized at a time.
constexpr int64_t step = 16;

template <class T>
BNB_INLINE inline uint8x16_t quantize_step(const Codebook256 &codebook, const T *x, float scale) {
    return codebook.nearest({{vmulq_n_f32(load4(x), scale), vmulq_n_f32(load4(x + 4), scale), vmulq_n_f32(load4(x + 8), scale),
                              vmulq_n_f32(load4(x + 12), scale)}});
}

/// Quantizes n elements, of which the last block may be shorter.
template <class T>
void quantize_blocks(const Codebook256 &codebook, const T *x, int64_t n, int64_t blocksize, uint8_t *codes, float *absmax) {
    for (; n > 0; n -= blocksize, x += blocksize, codes += blocksize, ++absmax) {
        const int64_t count = std::min(n, blocksize);
        *absmax = largest_magnitude(x, count);
        if (!std::isfinite(*absmax)) {  // scaled values are 0 or NaN
            std::memset(codes, codebook.code_of_zero(), static_cast<std::size_t>(count));
            continue;
        }
        const float scale = block_scale(*absmax);
        int64_t i = 0;
        for (; i + step <= count; i += step) vst1q_u8(codes + i, quantize_step(codebook, x + i, scale));
        if (i < count) {
            T rest[step] = {};
            uint8_t bytes[step];
            std::memcpy(rest, x + i, static_cast<std::size_t>(count - i) * sizeof(T));
            vst1q_u8(bytes, quantize_step(codebook, rest, scale));
            std::memcpy(codes + i, bytes, static_cast<std::size_t>(count - i));
        }
    }
}

}  // namespace

void quantize_blockwise(
    DType dtype, const void *x, int64_t n, const float *codebook, int64_t blocksize, uint8_t *codes, float *absmax, int threads) {
    const std::shared_ptr<const Codebook256> prepared = Codebook256::of(codebook);
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    with_type(dtype, [&](auto element) {
        const auto *values = static_cast<const decltype(element) *>(x);
        parallel_for(threads, blocks, std::max<int64_t>(1, grain / blocksize), [&](int64_t begin, int64_t end) {
            const int64_t start = begin * blocksize, count = std::min(n, end * blocksize) - start;
            quantize_blocks(*prepared, values + start, count, blocksize, codes + start, absmax + begin);
        });
    });
}

}  // namespace bnb
