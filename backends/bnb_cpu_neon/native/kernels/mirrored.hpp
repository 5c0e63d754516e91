/// Codebooks of 256 entries whose lower half mirrors the upper one, as the signed dynamic map's does.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>

#include "kernels/block256.hpp"

namespace bnb {

/// A codebook in which entry 127 is 0, and entry 127 - i is entry 127 + i with the other sign: 128 magnitudes, few enough for table
/// instructions, which look up 64 bytes. There are two tables for each of the four bytes of a magnitude.
///
/// Looking up in 64 bytes is slow, and so is loading entries one by one. Of half of the codes the entries are looked up and of the
/// other half they are loaded, by turns, so that a core does both at the same time.
class MirroredCodebook {
  public:
    /// Codes that are looked up at a time.
    static constexpr int64_t step = 128;

    /// The prepared form of a codebook; nothing if it is not of this kind.
    static std::optional<MirroredCodebook> of(const float *entries) {
        constexpr uint32_t sign = 0x80000000;
        std::array<uint32_t, 256> bits;
        std::memcpy(bits.data(), entries, sizeof bits);
        if (bits[127] != 0 || bits[255] >= sign) return std::nullopt;
        for (std::size_t i = 1; i < 128; ++i) {
            if (bits[127 + i] >= sign || bits[127 - i] != (bits[127 + i] | sign)) return std::nullopt;
        }
        return MirroredCodebook(entries, bits);
    }

    /// Looks up `step` codes. Calls `store(i, entries)` with entries 4 i to 4 i + 3, for a constant i, of the first half of them, and
    /// fills `second_half` with the others.
    template <class Store>
    BNB_INLINE void look_up(const uint8_t *codes, float *second_half, const Store &store) const {
        const float *const entries = entries_;
        hide(second_half);
        const auto load_8 = [&](int group) BNB_INLINE {
            copy_8_entries(codes + step / 2 + 8 * group, entries, second_half + 8 * group);
            keep_order();
        };
        const uint8x16_t middle = vdupq_n_u8(127);
        uint8x16_t code[4], index[4], found[4][4];
        for (int v = 0; v < 4; ++v) {
            code[v] = vld1q_u8(codes + 16 * v);
            index[v] = vsubq_u8(vabdq_u8(code[v], middle), vdupq_n_u8(1));  // 255 for entry 0: nothing is found, which is 0
            hide(index[v]);
        }
        const uint8_t *table = tables_[0][0];
        unroll<4>([&](auto byte) BNB_INLINE {
            const uint8x16x4_t lower = load_64(table);
            table += 64;
            for (int v = 0; v < 4; ++v) {
                found[byte][v] = vqtbl4q_u8(lower, index[v]);
                load_after(found[byte][v], table);
            }
            load_8(byte);
        });
        for (int v = 0; v < 4; ++v) index[v] = vsubq_u8(index[v], vdupq_n_u8(64));
        unroll<4>([&](auto byte) BNB_INLINE {
            const uint8x16x4_t upper = load_64(table);
            table += 64;
            for (int v = 0; v < 4; ++v) {
                found[byte][v] = vqtbx4q_u8(found[byte][v], upper, index[v]);
                load_after(found[byte][v], table);
            }
            load_8(4 + byte);
        });
        unroll<4>([&](auto v) BNB_INLINE {
            const uint8x16_t with_sign = put_above<7>(found[3][v], vcltq_u8(code[v], middle));
            const float32x4x4_t values = join_bytes(found[0][v], found[1][v], found[2][v], with_sign);
            unroll<4>([&](auto i) BNB_INLINE { store(4 * v + i, values.val[i]); });
        });
    }

  private:
    MirroredCodebook(const float *entries, const std::array<uint32_t, 256> &bits) : entries_(entries) {
        for (std::size_t i = 0; i < 128; ++i) {
            for (std::size_t byte = 0; byte < 4; ++byte) {
                tables_[i / 64][byte][i % 64] = static_cast<uint8_t>(bits[128 + i] >> (8 * byte));
            }
        }
    }

    const float *entries_;
    uint8_t tables_[2][4][64];  ///< of the bytes, the lowest first, of entries 128 to 191 and of those above
};

/// Fills the n entries of codes, without their scale, in the quickest way: `mirrored` is null if the codebook is not of that kind.
inline void copy_entries(const MirroredCodebook *mirrored, const uint8_t *codes, const float *codebook, int64_t n, float *out) {
    constexpr int64_t step = MirroredCodebook::step;
    for (; mirrored && n >= step; n -= step, codes += step, out += step) {
        mirrored->look_up(codes, out + step / 2, [&](auto i, float32x4_t found) BNB_INLINE { vst1q_f32(out + 4 * i, found); });
    }
    copy_entries(codes, codebook, n, out);
}

}  // namespace bnb
