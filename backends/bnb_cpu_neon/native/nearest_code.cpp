/// The tables of `NearestCode`, which take longer to make than a small tensor takes to encode, and are kept therefore.
#include "nearest_code.hpp"

#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

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

NearestCode::NearestCode(const float *codebook) {
    std::iota(code_of_rank_.begin(), code_of_rank_.end(), uint8_t{0});
    std::stable_sort(code_of_rank_.begin(), code_of_rank_.end(), [&](uint8_t a, uint8_t b) { return codebook[a] < codebook[b]; });
    for (std::size_t i = 0; i < 255; ++i) midpoints_[i] = (codebook[code_of_rank_[i]] + codebook[code_of_rank_[i + 1]]) * 0.5f;
    midpoints_[255] = std::numeric_limits<float>::infinity();

    rank_of_zero_ = rank_from(0, 0.0f);
    const uint32_t code_of_zero = code_of_rank_[rank_of_zero_];

    std::array<uint8_t, 1 << 16> first_ranks;
    uint32_t first = rank_of_zero_, last = rank_of_zero_;
    for (uint32_t bucket = 0; bucket < buckets_.size(); ++bucket) {
        const bool negative = bucket >> 15, is_infinity = (bucket & 0x7fff) == infinity_bucket;
        if ((bucket & 0x7fff) > infinity_bucket) {
            first_ranks[bucket] = static_cast<uint8_t>(rank_of_zero_);
            buckets_[bucket] = code_of_zero * 0x01010000u;
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
            buckets_[bucket] = code_of_zero << 24 | low << 16;
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

uint32_t NearestCode::rank_from(uint32_t rank, float value) const {
    while (midpoints_[rank] < value && rank < 255) ++rank;
    while (rank > 0 && !(midpoints_[rank - 1] < value)) --rank;
    return rank;
}

std::shared_ptr<const NearestCode> nearest_code(const float *codebook) {
    struct Entry {
        std::array<float, 256> codebook;
        std::shared_ptr<const NearestCode> code;
    };
    constexpr std::size_t most = 8;
    static std::mutex mutex;
    static auto &entries = *new std::vector<Entry>;  // used first is last; never destroyed, like the threads that use it

    std::array<float, 256> contents;
    std::copy(codebook, codebook + 256, contents.begin());
    const auto find = [&] {
        return std::find_if(entries.begin(), entries.end(), [&](const Entry &entry) {
            return std::memcmp(entry.codebook.data(), contents.data(), sizeof contents) == 0;
        });
    };
    {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto found = find();
        if (found != entries.end()) return found->code;
    }
    auto made = std::make_shared<const NearestCode>(contents.data());
    const std::lock_guard<std::mutex> lock(mutex);
    if (find() == entries.end()) {
        if (entries.size() == most) entries.erase(entries.begin());
        entries.push_back({contents, made});
    }
    return made;
}

}  // namespace bnb
