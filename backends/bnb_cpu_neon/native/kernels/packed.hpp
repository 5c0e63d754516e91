/// Values of packed 4-bit codes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elements.hpp"
#include "kernels/scales.hpp"

namespace bnb {

/// A codebook of 16 float32 entries that looks up 16 codes at a time.
///
/// A table instruction looks up bytes: there is one table for each of the four bytes of an entry, and the bytes that are found
/// are put together again. That takes 12 instructions for 16 codes, whatever the codebook.
class Codebook16 {
  public:
    explicit Codebook16(const float *entries) : planes_(vld4q_u8(reinterpret_cast<const uint8_t *>(entries))) {}

    /// The values of 16 codes, in order, four in each vector.
    float32x4x4_t operator[](uint8x16_t codes) const {
        return join_bytes(
            vqtbl1q_u8(planes_.val[0], codes), vqtbl1q_u8(planes_.val[1], codes), vqtbl1q_u8(planes_.val[2], codes),
            vqtbl1q_u8(planes_.val[3], codes));
    }

  private:
    uint8x16x4_t planes_;
};

/// Elements that are unpacked at a time: those of one vector of bytes.
constexpr int64_t packed_step = 32;

/// The codes of the first and of the second 16 elements in 16 bytes.
inline uint8x16x2_t unpack(const uint8_t *packed) {
    const uint8x16_t bytes = vld1q_u8(packed);
    const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
    return {{vzip1q_u8(even, odd), vzip2q_u8(even, odd)}};
}

/// Fills `out` with `packed_step` values of one block.
template <class T>
inline void dequantize_step(const uint8_t *packed, const Codebook16 &codebook, float scale, T *out) {
    const uint8x16x2_t codes = unpack(packed);
    for (int half = 0; half < 2; ++half) {
        const float32x4x4_t values = codebook[codes.val[half]];
        unroll<4>([&](auto i) BNB_INLINE { store4(out + 16 * half + 4 * i, vmulq_n_f32(values.val[i], scale)); });
    }
}

/// Fills `out` with fewer values than that, of one block, reading no byte beyond them.
template <class T>
__attribute__((noinline)) void dequantize_rest(const uint8_t *packed, int64_t count, const Codebook16 codebook, float scale, T *out) {
    uint8_t bytes[packed_step / 2] = {};
    T values[packed_step];
    std::memcpy(bytes, packed, static_cast<std::size_t>(count + 1) / 2);
    dequantize_step(bytes, codebook, scale, values);
    std::memcpy(out, values, static_cast<std::size_t>(count) * sizeof(T));
}

/// A quantized tensor of row-major elements.
struct Packed4bit {
    const uint8_t *codes;  ///< two in a byte, the first in the high half
    BlockScales scales;
    const float *codebook;  ///< [16]
};

/// Goes through elements begin to end of a tensor, block by block. Takes a copy of the tensor, which no store can change.
///
/// Calls `one(value)` if the first of them is the second of its byte; `whole(packed, scale)` for each whole block; and
/// `part(packed, count, scale)` for what there is of the first and of the last block.
template <class One, class Part, class Whole>
BNB_INLINE inline void for_each_block(
    const Packed4bit tensor, int64_t begin, int64_t end, const One &one, const Part &part, const Whole &whole) {
    const int64_t blocksize = tensor.scales.blocksize;
    int64_t block = begin / blocksize;
    if (begin < end && begin % 2) {
        one(tensor.codebook[tensor.codes[begin / 2] & 15] * tensor.scales[block]);
        ++begin;
    }
    const uint8_t *packed = tensor.codes + begin / 2;
    if (begin > block * blocksize) {
        const int64_t stop = std::min(end, (block + 1) * blocksize);
        if (begin < stop) part(packed, stop - begin, tensor.scales[block]);
        packed += (stop - begin) / 2;
        begin = stop;
        ++block;
    }
    const int64_t last = end / blocksize;
    for (; block < last; ++block, packed += blocksize / 2) whole(packed, tensor.scales[block]);
    if (begin < end && end > last * blocksize) part(packed, end - last * blocksize, tensor.scales[last]);
}

/// Fills `out` with elements begin to end, of which any may be in the middle of a byte or of a block.
template <class T>
void dequantize(const Packed4bit &tensor, const Codebook16 codebook, int64_t begin, int64_t end, T *out) {
    const int64_t pairs_of_steps = tensor.scales.blocksize / (2 * packed_step);
    for_each_block(
        tensor, begin, end, [&](float value) BNB_INLINE { store1(out++, value); },
        [&](const uint8_t *packed, int64_t count, float scale) BNB_INLINE {
            for (; count >= packed_step; count -= packed_step, packed += packed_step / 2, out += packed_step) {
                dequantize_step(packed, codebook, scale, out);
            }
            if (count) dequantize_rest(packed, count, codebook, scale, out);
            out += count;
        },
        [&](const uint8_t *packed, float scale) BNB_INLINE {
            int64_t pair = pairs_of_steps;
            if (pair == 0) {  // a blocksize of one step
                dequantize_step(packed, codebook, scale, out);
                out += packed_step;
            }
            for (; pair; --pair, packed += packed_step, out += 2 * packed_step) {
                dequantize_step(packed, codebook, scale, out);
                dequantize_step(packed + packed_step / 2, codebook, scale, out + packed_step);
            }
        });
}

}  // namespace bnb
