/// What both fuzz targets share: an input made of arbitrary bytes, and the definition that its codes are checked against.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "elements.hpp"

/// Ends the run, which the fuzzer takes for a crash, unless the condition holds.
#define REQUIRE(condition)                                                                    \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                     \
        }                                                                                     \
    } while (0)

/// Arguments of a quantizer: a dtype, a blocksize, a codebook and values of any bits. Every buffer is as large as it must be and
/// no larger, so that the address sanitizer sees whoever leaves it.
template <std::size_t entries>
class Arguments {
  public:
    Arguments(const uint8_t *bytes, std::size_t size) : bytes_(bytes), left_(size) {
        dtype = static_cast<bnb::DType>(byte() % 3);
        blocksize_byte = byte();
        read_codebook();
        element_size = dtype == bnb::DType::float32 ? 4 : 2;
        n = static_cast<int64_t>(left_ / element_size);
        const std::size_t used = static_cast<std::size_t>(n) * element_size;
        values_.reset(new uint8_t[used]);
        if (used) std::memcpy(values_.get(), bytes_, used);
    }

    const void *values() const { return values_.get(); }

    float value(int64_t i) const {
        return bnb::with_type(dtype, [&](auto element) {
            std::memcpy(&element, values_.get() + static_cast<std::size_t>(i) * element_size, sizeof element);
            return bnb::load1(&element);
        });
    }

    /// Whether the definition says what codes there are: it orders entries, which NaN have no place in.
    bool has_order() const {
        return std::all_of(codebook.get(), codebook.get() + entries, [](float entry) { return std::isfinite(entry); });
    }

    bnb::DType dtype;
    uint8_t blocksize_byte;  ///< from which the target makes a blocksize
    int64_t n;
    std::size_t element_size;
    std::unique_ptr<float[]> codebook{new float[entries]};

  private:
    uint8_t byte() { return left_ ? --left_, *bytes_++ : uint8_t{0}; }

    /// Entries in equal steps, which leaves most of the input to the values; or any numbers of such steps, so that entries repeat
    /// and values lie on their midpoints; or any bits.
    void read_codebook() {
        const uint8_t kind = byte() % 4;
        for (std::size_t i = 0; i < entries; ++i) {
            if (kind == 0) {
                const uint32_t bits = uint32_t{byte()} << 24 | uint32_t{byte()} << 16 | uint32_t{byte()} << 8 | byte();
                std::memcpy(&codebook[i], &bits, sizeof bits);
            } else {
                const int step = kind == 1 ? static_cast<int8_t>(byte()) : static_cast<int>(i * 256 / entries) - 127;
                codebook[i] = static_cast<float>(step) / 128;
            }
        }
    }

    const uint8_t *bytes_;
    std::size_t left_;
    std::unique_ptr<uint8_t[]> values_;
};

/// The definition of a quantized block, computed without any of the kernels' code; see bnb_core.ops.spec.
template <std::size_t entries>
class Definition {
  public:
    explicit Definition(const float *codebook) {
        for (std::size_t i = 0; i < entries; ++i) codes_[i] = static_cast<uint8_t>(i);
        std::stable_sort(codes_.begin(), codes_.end(), [&](uint8_t a, uint8_t b) { return codebook[a] < codebook[b]; });
        for (std::size_t i = 0; i + 1 < entries; ++i) midpoints_[i] = (codebook[codes_[i]] + codebook[codes_[i + 1]]) * 0.5f;
    }

    /// The largest magnitude of the values from `begin` to `end`; NaN if one of them is.
    static float absmax(const Arguments<entries> &arguments, int64_t begin, int64_t end) {
        float largest = 0;
        for (int64_t i = begin; i < end; ++i) {
            const float magnitude = std::fabs(arguments.value(i));
            if (!(magnitude <= largest)) largest = magnitude;
            if (std::isnan(largest)) break;
        }
        return largest;
    }

    /// The code of a value in a block of that absmax.
    uint8_t code(float value, float absmax) const {
        const float divisor = absmax > 0x1p-126f ? absmax : 0x1p-126f;
        float scaled = std::isnan(absmax) ? 0 : value * (1.0f / divisor);
        if (std::isnan(scaled)) scaled = 0;
        std::size_t rank = 0;
        for (float midpoint : midpoints_) rank += midpoint < scaled;
        return codes_[rank];
    }

  private:
    std::array<uint8_t, entries> codes_;
    std::array<float, entries - 1> midpoints_;
};
