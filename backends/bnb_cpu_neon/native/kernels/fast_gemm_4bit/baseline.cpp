/// On any core: 8-bit products, added up in 16 bits by twos, which they fit, and then in 32.
#include "kernels/fast_gemm_4bit/dot_rows.hpp"

namespace bnb::fast {

void dot_rows_baseline(
    const Blocks &x, const uint8_t *const (&packed)[rows_at_once], int8x16_t table, const Scales &scales, float *sums) {
    dot_rows(x, packed, table, scales, sums, [](int32x4_t sum, int8x16_t a, int8x16_t b) BNB_INLINE {
        return vpadalq_s16(sum, vmlal_high_s8(vmull_s8(vget_low_s8(a), vget_low_s8(b)), a, b));
    });
}

}  // namespace bnb::fast
