/// The order of a codebook's entries, from which every quantization follows: rank, midpoints, and the code of each rank.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace bnb {

/// Entries sorted by value and then by code; the midpoint of two neighbours is (a + b) * 0.5 in float32.
template <std::size_t entries>
struct Ranked {
    std::array<uint8_t, entries> code_of_rank;
    std::array<float, entries - 1> midpoints;

    explicit Ranked(const float *codebook) {
        for (std::size_t i = 0; i < entries; ++i) code_of_rank[i] = static_cast<uint8_t>(i);
        std::stable_sort(code_of_rank.begin(), code_of_rank.end(), [codebook](uint8_t a, uint8_t b) {
            // NaN comes last, so that this is an order whatever the codebook holds.
            return codebook[a] < codebook[b] || (std::isnan(codebook[b]) && !std::isnan(codebook[a]));
        });
        for (std::size_t i = 0; i + 1 < entries; ++i) {
            midpoints[i] = (codebook[code_of_rank[i]] + codebook[code_of_rank[i + 1]]) * 0.5f;
        }
    }

    /// The code of s = 0, which also stands for a NaN.
    uint8_t code_of_zero() const { return code_of_rank[count_below(0.0f)]; }

    /// The rank of a scaled value: the number of midpoints strictly below it.
    std::size_t count_below(float s) const {
        return static_cast<std::size_t>(std::count_if(midpoints.begin(), midpoints.end(), [s](float m) { return m < s; }));
    }
};

}  // namespace bnb
