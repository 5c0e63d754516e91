/// Where a CPU has `asimddp`: one instruction for 16 products.
#include "kernels/fast_gemm_4bit/dot_rows.hpp"

namespace bnb::fast {

void dot_rows_dotprod(
    const Blocks &x, const uint8_t *const (&packed)[rows_at_once], int8x16_t table, const Scales &scales, float *sums) {
    dot_rows(x, packed, table, scales, sums, [](int32x4_t sum, int8x16_t a, int8x16_t b) BNB_INLINE { return vdotq_s32(sum, a, b); });
}

}  // namespace bnb::fast
