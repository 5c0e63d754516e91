/// `Codebook256` against a count of midpoints, for codebooks of every kind and values around every midpoint.
#include "kernels/codebook256.hpp"

#include <cmath>
#include <cstring>
#include <limits>

#include "check.hpp"

using Codebook = std::vector<float>;

static std::vector<Codebook> codebooks() {
    std::mt19937 random(0);
    std::uniform_real_distribution<float> uniform(-1, 1);
    Codebook dynamic, linear, unsorted, repeated, clustered, positive;
    for (int decade = 0; decade < 7; ++decade)
        for (int i = 0; i < 1 << decade; ++i) {
            const float value = static_cast<float>(std::pow(10.0, decade - 6) * (0.1 + 0.9 * (i + 0.5) / (1 << decade)));
            dynamic.push_back(value);
            dynamic.push_back(-value);
        }
    dynamic.push_back(0);
    dynamic.push_back(1);
    std::sort(dynamic.begin(), dynamic.end());
    for (int i = 0; i < 256; ++i) {
        linear.push_back(static_cast<float>(i - 127) / 128);
        unsorted.push_back(uniform(random));
        repeated.push_back(static_cast<float>(i / 8) / 32 - 0.5f);
        clustered.push_back(0.5f + static_cast<float>(i) * 0x1p-24f);
        positive.push_back(static_cast<float>(i + 1) / 256);
    }
    return {dynamic, linear, unsorted, repeated, clustered, positive};
}

static uint8_t expected_code(const Codebook &codebook, float s) {
    std::vector<int> codes(256);
    for (int i = 0; i < 256; ++i) codes[static_cast<std::size_t>(i)] = i;
    const auto value = [&](int code) { return codebook[static_cast<std::size_t>(code)]; };
    std::stable_sort(codes.begin(), codes.end(), [&](int a, int b) { return value(a) < value(b); });
    if (std::isnan(s)) s = 0;
    std::size_t rank = 0;
    for (std::size_t i = 0; i < 255; ++i) rank += (value(codes[i]) + value(codes[i + 1])) * 0.5f < s;
    return static_cast<uint8_t>(codes[rank]);
}

TEST(codebook256_codes_of_values_around_midpoints) {
    const float infinity = std::numeric_limits<float>::infinity();
    std::mt19937 random(1);
    for (const Codebook &codebook : codebooks()) {
        std::vector<float> values{0.0f, -0.0f, 1.0f, -1.0f, infinity, -infinity, std::nanf(""), -std::nanf("")};
        for (float value : {0x1p-149f, -0x1p-149f, 3e38f}) values.push_back(value);
        Codebook sorted = codebook;
        std::sort(sorted.begin(), sorted.end());
        for (std::size_t i = 0; i < 255; ++i) {
            const float midpoint = (sorted[i] + sorted[i + 1]) * 0.5f;
            for (float value : {midpoint, std::nextafter(midpoint, infinity), std::nextafter(midpoint, -infinity), sorted[i]})
                values.push_back(value);
        }
        for (int i = 0; i < 500; ++i) {
            const uint32_t bits = static_cast<uint32_t>(random());
            float value;
            std::memcpy(&value, &bits, sizeof value);
            values.push_back(value);
        }
        Guarded<float> input(values.size());
        Guarded<uint8_t> codes(values.size());
        std::copy(values.begin(), values.end(), input.begin());
        const auto code = bnb::Codebook256::of(codebook.data());
        code->encode(input.data(), static_cast<int64_t>(values.size()), 1.0f, codes.data());
        for (std::size_t i = 0; i < values.size(); ++i) CHECK(codes[i] == expected_code(codebook, values[i]));
    }
}

TEST(codebook256_codes_of_every_count) {
    const Codebook codebook = codebooks().front();
    const auto code = bnb::Codebook256::of(codebook.data());
    for (std::size_t count = 0; count < 50; ++count) {
        Guarded<bnb::BFloat16> input(count, Guarded<bnb::BFloat16>::beginning);
        Guarded<uint8_t> codes(count);
        for (std::size_t i = 0; i < count; ++i) bnb::store1(&input[i], static_cast<float>(i) - 20);
        code->encode(input.data(), static_cast<int64_t>(count), 0.01f, codes.data());
        for (std::size_t i = 0; i < count; ++i) CHECK(codes[i] == expected_code(codebook, (static_cast<float>(i) - 20) * 0.01f));
    }
}

TEST(codebook256_is_kept_by_contents) {
    Codebook codebook = codebooks().front();
    const Codebook copy = codebook;
    const auto first = bnb::Codebook256::of(codebook.data());
    CHECK(bnb::Codebook256::of(copy.data()) == first);
    codebook[7] += 0.001f;
    CHECK(bnb::Codebook256::of(codebook.data()) != first);
}
