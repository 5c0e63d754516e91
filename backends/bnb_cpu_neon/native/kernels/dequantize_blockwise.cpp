/// dequantize_blockwise: one form for all tiers. Entries are loaded one by one: table instructions, of which 16 codes take 16 of the
/// slowest, are fewer but take longer.
#include "kernels/block256.hpp"
#include "kernels/blockwise.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

/// Fills `out` with n values, of which the last block may be shorter.
template <class T>
void dequantize_blocks(const uint8_t *codes, const float *absmax, const float *codebook, int64_t blocksize, int64_t n, T *out) {
    for (; n > 0; n -= blocksize, ++absmax) {
        const float scale = *absmax;
        int64_t count = std::min(n, blocksize);
        for (; count >= copy_step; count -= copy_step, codes += copy_step, out += copy_step) {
            float entries[copy_step];
            copy_entries(codes, codebook, entries);
            unroll<copy_step / 4>([&](auto i) BNB_INLINE { store4(out + 4 * i, vmulq_n_f32(vld1q_f32(entries + 4 * i), scale)); });
        }
        for (; count > 0; --count) store1(out++, codebook[*codes++] * scale);
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
