/// How a codebook of 256 entries is prepared, and kept.
#include "kernels/codebook256.hpp"

#include <cstring>
#include <deque>
#include <limits>
#include <mutex>

#include "kernels/ranked.hpp"

namespace bnb {
namespace {

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr uint32_t infinity_bucket = 0x7f80;  // without its sign; NaN is above

}  // namespace

Codebook256::Codebook256(const float *entries) {
    std::copy(entries, entries + 256, entries_.begin());
    const Ranked<256> ranked(entries);
    code_of_rank_ = ranked.code_of_rank;
    std::copy(ranked.midpoints.begin(), ranked.midpoints.end(), midpoints_.begin());
    midpoints_[255] = std::numeric_limits<float>::infinity();
    rank_of_zero_ = rank_from(0, 0.0f);

    std::array<uint8_t, 1 << 16> first_ranks;
    uint32_t first = rank_of_zero_, last = rank_of_zero_;
    for (uint32_t bucket = 0; bucket < buckets_.size(); ++bucket) {
        const bool negative = bucket >> 15, is_infinity = (bucket & 0x7fff) == infinity_bucket;
        if ((bucket & 0x7fff) > infinity_bucket) {
            first_ranks[bucket] = static_cast<uint8_t>(rank_of_zero_);
            buckets_[bucket] = code_of_zero() * 0x01010000u;
            continue;
        }
        // The bucket's values that are least and greatest in magnitude.
        const uint32_t small = bucket << 16, large = is_infinity ? small : small | 0xffff;
        first = rank_from(first, from_bits(negative ? large : small));
        last = rank_from(last, from_bits(negative ? small : large));
        first_ranks[bucket] = static_cast<uint8_t>(first);
        const uint32_t low = code_of_rank_[first], high = code_of_rank_[last];
        const uint32_t midpoint = to_bits(midpoints_[first]) & 0xffff;
        if (is_infinity) {  // with any lower bit it is NaN
            buckets_[bucket] = uint32_t{code_of_zero()} << 24 | low << 16;
        } else if (first == last) {
            buckets_[bucket] = low * 0x01010000u;
        } else if (midpoints_[first] != midpoints_[last - 1]) {
            isolated_ = false;
        } else if (negative) {  // larger bits are smaller values, and the midpoint itself belongs to the smaller ones
            buckets_[bucket] = low << 24 | high << 16 | (midpoint - 1);
        } else {
            buckets_[bucket] = high << 24 | low << 16 | midpoint;
        }
    }
    if (!isolated_) std::copy(first_ranks.begin(), first_ranks.end(), buckets_.begin());
}

uint32_t Codebook256::rank_from(uint32_t rank, float value) const {
    while (midpoints_[rank] < value && rank < 255) ++rank;
    while (rank > 0 && !(midpoints_[rank - 1] < value)) --rank;
    return rank;
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
