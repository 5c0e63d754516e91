/// How a codebook of 256 entries is prepared, and kept.
#include "kernels/codebook256.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>

#include "kernels/ranked.hpp"

namespace bnb {
namespace {

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

Codebook256::Codebook256(const float *entries) {
    std::copy(entries, entries + 256, entries_.begin());
    const Ranked<256> ranked(entries);
    code_of_zero_ = ranked.code_of_zero();

    // Equal midpoints are passed together, so each is kept once. One that is NaN is never below anything.
    constexpr float infinity = std::numeric_limits<float>::infinity();
    midpoints_.fill(infinity);
    code_of_rank_.fill(0);
    std::size_t distinct = 0, passed = 0;
    code_of_rank_[0] = ranked.code_of_rank[0];
    for (const float midpoint : ranked.midpoints) {
        if (std::isnan(midpoint)) continue;
        if (distinct == 0 || midpoint != midpoints_[distinct - 1]) midpoints_[distinct++] = midpoint;
        code_of_rank_[distinct] = ranked.code_of_rank[++passed];
    }
    ranks_are_codes_ = true;
    for (std::size_t rank = 0; rank <= distinct; ++rank) ranks_are_codes_ = ranks_are_codes_ && code_of_rank_[rank] == rank;

    comparisons_ = 1;
    const auto begin = midpoints_.begin(), end = begin + static_cast<std::ptrdiff_t>(distinct);
    for (uint32_t number = 0; number < buckets; ++number) {
        const uint32_t offset = number & ((1u << sign_bit) - 1);
        float smallest = offset ? float_of(lowest_bits + (offset << mantissa_shift)) : 0.0f;
        float largest = float_of(lowest_bits + ((offset + 1) << mantissa_shift) - 1);
        if (number >> sign_bit) {
            std::swap(smallest, largest);
            smallest = -smallest;
            largest = -largest;
        }
        const auto first = std::lower_bound(begin, end, smallest), last = std::lower_bound(begin, end, largest);
        buckets_[number] = {first == end ? infinity : *first, static_cast<uint32_t>(first - begin)};
        comparisons_ = std::max(comparisons_, static_cast<int>(last - first));
    }
}

uint32x4x4_t Codebook256::compare_again(float32x4x4_t s, uint32x4x4_t ranks) const {
    for (int comparison = 1; comparison < comparisons_; ++comparison) {
        for (int i = 0; i < 4; ++i) {
            float32x4_t next = vdupq_n_f32(midpoints_[vgetq_lane_u32(ranks.val[i], 0)]);
            next = vsetq_lane_f32(midpoints_[vgetq_lane_u32(ranks.val[i], 1)], next, 1);
            next = vsetq_lane_f32(midpoints_[vgetq_lane_u32(ranks.val[i], 2)], next, 2);
            next = vsetq_lane_f32(midpoints_[vgetq_lane_u32(ranks.val[i], 3)], next, 3);
            ranks.val[i] = vsubq_u32(ranks.val[i], vcgtq_f32(s.val[i], next));
        }
    }
    return ranks;
}

uint8x16_t Codebook256::codes_of(uint8x16_t ranks) const {
    uint8x16_t codes = vdupq_n_u8(0);
    for (int quarter = 0; quarter < 4; ++quarter) {  // a table instruction takes 64 bytes, and passes over what is beyond them
        codes = vqtbx4q_u8(codes, vld1q_u8_x4(code_of_rank_.data() + 64 * quarter), vsubq_u8(ranks, vdupq_n_u8(64 * quarter)));
    }
    return codes;
}

std::shared_ptr<const Codebook256> Codebook256::of(const float *entries) {
    constexpr std::size_t most = 8;
    static std::mutex mutex;
    static std::deque<std::shared_ptr<const Codebook256>> kept;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto &codebook : kept) {
        if (std::memcmp(codebook->entries(), entries, 256 * sizeof(float)) == 0) return codebook;
    }
    kept.push_front(std::make_shared<Codebook256>(entries));
    if (kept.size() > most) kept.pop_back();
    return kept.front();
}

}  // namespace bnb
