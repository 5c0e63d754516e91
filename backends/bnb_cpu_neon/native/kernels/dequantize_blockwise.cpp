/// dequantize_blockwise: one form for all tiers.
#include "kernels/blockwise.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

/// Four entries of the table. Loading them one by one beats table instructions, of which 16 codes would take 16 of the slowest.
inline float32x4_t look_up(const float *codebook, const uint8_t *codes) {
    float32x4_t values = vdupq_n_f32(codebook[codes[0]]);
    values = vsetq_lane_f32(codebook[codes[1]], values, 1);
    values = vsetq_lane_f32(codebook[codes[2]], values, 2);
    return vsetq_lane_f32(codebook[codes[3]], values, 3);
}

/// Fills `out` with n values, of which the last block may be shorter.
template <class T>
void dequantize_blocks(const uint8_t *codes, const float *absmax, const float *codebook, int64_t blocksize, int64_t n, T *out) {
    for (; n > 0; n -= blocksize, codes += blocksize, ++absmax, out += blocksize) {
        const int64_t count = std::min(n, blocksize);
        const float scale = *absmax;
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) {
            unroll<4>([&](auto j) BNB_INLINE { store4(out + i + 4 * j, vmulq_n_f32(look_up(codebook, codes + i + 4 * j), scale)); });
        }
        for (; i < count; ++i) store1(out + i, codebook[codes[i]] * scale);
    }
}

}  // namespace

void dequantize_blockwise(
    const uint8_t *codes, const float *absmax, const float *codebook, int64_t blocksize, int64_t n, DType dtype, void *out,
    int threads) {
    const int64_t blocks = (n + blocksize - 1) / blocksize;
    with_type(dtype, [&](auto element) {
        auto *values = static_cast<decltype(element) *>(out);
        parallel_for(threads, blocks, std::max<int64_t>(1, grain / blocksize), [&](int64_t begin, int64_t end) {
            const int64_t start = begin * blocksize, count = std::min(n, end * blocksize) - start;
            dequantize_blocks(codes + start, absmax + begin, codebook, blocksize, count, values + start);
        });
    });
}

}  // namespace bnb
