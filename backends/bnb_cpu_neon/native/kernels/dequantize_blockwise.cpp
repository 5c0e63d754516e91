/// dequantize_blockwise: one form for all tiers.
#include "kernels/block256.hpp"
#include "kernels/blockwise.hpp"
#include "kernels/mirrored.hpp"
#include "parallel.hpp"

namespace bnb {
namespace {

/// Elements below which a second thread costs more than it saves.
constexpr int64_t grain = 1 << 15;

/// Multiplies entries by their scale.
template <int64_t count, class T>
BNB_INLINE inline void scale_entries(const float *entries, float scale, T *out) {
    unroll<count / 16>([&](auto group) BNB_INLINE {
        float32x4_t values[4];
        for (int i = 0; i < 4; ++i) values[i] = vmulq_n_f32(vld1q_f32(entries + 16 * group + 4 * i), scale);
        for (int i = 0; i < 4; ++i) store4(out + 16 * group + 4 * i, values[i]);
    });
}

/// Fills `out` with n values, of which the last block may be shorter. `mirrored` is null if the codebook is not of that kind.
template <class T>
void dequantize_blocks(
    const uint8_t *codes, const float *absmax, const float *codebook, const MirroredCodebook *mirrored, int64_t blocksize, int64_t n,
    T *out) {
    constexpr int64_t step = MirroredCodebook::step, half = step / 2;
    for (; n > 0; n -= blocksize, ++absmax) {
        const float scale = *absmax;
        int64_t count = std::min(n, blocksize);
        for (; mirrored && count >= step; count -= step, codes += step, out += step) {
            float entries[half];
            mirrored->look_up(codes, entries, [&](auto i, float32x4_t found) BNB_INLINE { store4(out + 4 * i, vmulq_n_f32(found, scale)); });
            scale_entries<half>(entries, scale, out + half);
        }
        for (; count >= copy_step; count -= copy_step, codes += copy_step, out += copy_step) {
            float entries[copy_step];
            copy_entries(codes, codebook, entries);
            scale_entries<copy_step>(entries, scale, out);
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
        // Conversions to 16 bits take the same execution units as looking up, which is then no quicker.
        std::optional<MirroredCodebook> mirrored;
        if (dtype == DType::float32) mirrored = MirroredCodebook::of(codebook);
        parallel_for(threads, blocks, std::max<int64_t>(1, grain / blocksize), [&](int64_t begin, int64_t end) {
            const int64_t start = begin * blocksize, count = std::min(n, end * blocksize) - start;
            dequantize_blocks(codes + start, absmax + begin, codebook, mirrored ? &*mirrored : nullptr, blocksize, count, values + start);
        });
    });
}

}  // namespace bnb
