/// `MirroredCodebook`, and what is looked up in it, against the entries themselves.
#include "kernels/mirrored.hpp"

#include <cmath>
#include <cstring>

#include "check.hpp"
#include "kernels/blockwise.hpp"

using Codebook = std::vector<float>;

/// A codebook with mirrored entries: all their bytes differ from one to the next.
static Codebook mirrored_codebook() {
    std::mt19937 random(3);
    std::uniform_real_distribution<float> uniform(0, 1);
    Codebook codebook(256);
    for (std::size_t i = 1; i <= 128; ++i) {
        codebook[127 + i] = uniform(random);
        if (i < 128) codebook[127 - i] = -codebook[127 + i];
    }
    return codebook;
}

TEST(mirrored_codebooks_are_recognized) {
    const Codebook codebook = mirrored_codebook();
    CHECK(bnb::MirroredCodebook::of(codebook.data()));
    for (std::size_t i = 0; i < 256; ++i) {
        Codebook other = codebook;
        other[i] = -other[i];  // also of 0
        CHECK(!bnb::MirroredCodebook::of(other.data()));
        other[i] = std::nextafter(codebook[i], 2.0f);
        CHECK(!bnb::MirroredCodebook::of(other.data()) || i == 255);
    }
}

TEST(mirrored_entries_of_every_code_and_count) {
    const Codebook codebook = mirrored_codebook();
    const auto mirrored = bnb::MirroredCodebook::of(codebook.data());
    std::mt19937 random(4);
    for (std::size_t n = 0; n < 600; n += n % 128 < 3 || n % 128 > 124 ? 1 : 30) {
        Guarded<uint8_t> codes(n, n % 2 ? Guarded<uint8_t>::beginning : Guarded<uint8_t>::end);
        Guarded<float> out(n, n % 2 ? Guarded<float>::beginning : Guarded<float>::end);
        for (std::size_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(i < 256 ? i * 7 : random());
        bnb::copy_entries(&*mirrored, codes.data(), codebook.data(), static_cast<int64_t>(n), out.data());
        for (std::size_t i = 0; i < n; ++i) CHECK(std::memcmp(&out[i], &codebook[codes[i]], sizeof(float)) == 0);

        const float absmax[] = {3.0f, 0.7f, 1e-39f, 2e38f, 0.0f};
        bnb::dequantize_blockwise(
            codes.data(), absmax, codebook.data(), 150, static_cast<int64_t>(n), bnb::DType::float32, out.data(), 1);
        for (std::size_t i = 0; i < n; ++i) {
            const float expected = codebook[codes[i]] * absmax[i / 150];
            CHECK(std::memcmp(&out[i], &expected, sizeof(float)) == 0);
        }
    }
}
